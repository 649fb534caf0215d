"""The contract of a backend: everything particular to a quantization method, in one place.

To add one: write `backends/yourname.py` with a subclass of `Backend` (CONTRIBUTING.md has a complete example). Nothing
else has to be touched. Only `name`, `methods`, `load`, `tensor_sizes` and `code` have to be written, without `load`
and `code` where another `runtime` executes the variants; every other
method has a default that is right for a method without that particularity:

- In lists: `describe`, `bits`, `needs_cuda`, `offers`
- Options: `check`, `complete`, `with_calibration`
- Loading: `requires`, `making`, `loggers`, `silence`, `prepare`, `load`, `tensor_sizes`, `needed_bytes`,
  `workspace_bytes`, `compute_dtype`
- Quantized checkpoints: `reads`, `readers`, `makes_checkpoints`, `make`, `random_config`, `random_layer`
- Written to a folder: `loaded_by`, `save`
- What is stored: `quantizes_experts`, `libraries`, `owns`, `weight_name`, `stored_values`, `quant_state`, `logical`, `dequantize`, `types`
- Decoding: `on_parallel_streams`, `opaque`, `deterministic`, `graph_refusal`, `capture_forward`
- Adapters and training: `check_adapter`, `reading_state_dict`, `training`, `training_variants`, `training_bytes`,
  `prepare_for_training`
- Code to copy: `code`, `code_weights`, `code_comment`, `code_after`

Importing a backend must be cheap: torch and the method's own library are imported inside the methods.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from comparator.backends.notation import Notation
from comparator.backends.options import KV_CACHE, Method, Option
from comparator.backends.records import (
    DTYPES,
    AdapterKind,
    LoadedModel,
    Logical,
    Placement,
    Progress,
    QuantizedType,
    Training,
)
from comparator.backends.sizes import TensorSize
from comparator.core.errors import UserError
from comparator.core.result import LayerRow
from comparator.core.variant import Variant
from comparator.sources import packed

if TYPE_CHECKING:
    from comparator.sources import Checkpoint

__all__ = [
    "DTYPES", "AdapterKind", "Backend", "LoadedModel", "Logical", "Method", "Option", "Placement", "Progress",
    "QuantizedType", "TensorSize", "Training",
]  # fmt: skip


class Backend(Notation):
    """Subclass this. One instance serves all models; it must hold no model."""

    name: ClassVar[str]
    runtime: ClassVar[str] = "transformers"
    """Name of the `Runtime` (comparator/runtimes) that executes its variants. Another one loads them itself: `load` and
    what follows it below is asked by transformers' only."""
    source_kind: ClassVar[Literal["checkpoint", "endpoint"]] = "checkpoint"
    """What a source after the @ is: a model's files, with a tokenizer that has to fit, or a server."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Packages that must be installed, by import name, which is also what pip installs and whose versions every
    document's environment records."""
    install: ClassVar[str] = ""
    """What follows `pip install` where that is not the missing packages of `requires`: a file with their releases."""
    making: ClassVar[tuple[str, ...]] = ()
    """Packages that only making a checkpoint here takes, as in `requires`: METHOD@SOURCE works without."""
    install_making: ClassVar[str] = ""
    """As `install`, for `making`."""
    libraries: ClassVar[tuple[str, ...]] = ()
    """Python packages or modules whose classes this backend's layers, weights and quant states are. Objects of these
    classes are searched for tensors when memory is counted; layer rows name the library before the class."""
    loggers: ClassVar[tuple[str, ...]] = ()
    """Loggers set to ERROR before anything is imported, whichever backend is used: other libraries import this one's."""
    weight_name: ClassVar[str] = "weight"
    """Name of the parameter or buffer of a quantized module that holds the packed weight; quant state is counted in
    its layer row."""
    types: ClassVar[tuple[QuantizedType, ...]] = ()
    """Every quantized dtype that `logical` names."""
    calibration_option: ClassVar[str | None] = None
    """Name of the option that holds the calibration text, for a method that takes one."""
    reads: ClassVar[tuple[str, ...]] = ()
    """Values of `quant_method` in config.json of the checkpoints that the method loads as its source."""
    loaded_by: ClassVar[tuple[str, ...]] = ()
    """Other programs whose documentation says that they load what `save` writes: "transformers", "vLLM", "llama.cpp"."""
    quantizes_experts: ClassVar[bool] = False
    """Whether experts that transformers fuses into one parameter a layer are quantized; most methods take linear layers."""
    makes_checkpoints: ClassVar[bool] = False
    """Whether `make` writes such checkpoints from full precision."""
    random_config: ClassVar[dict[str, Any]] = {}
    """For a benchmark on random weights: what config.json of a checkpoint made of `random_layer` says."""

    cache_options: ClassVar[tuple[Option, ...]] = (KV_CACHE,)
    """Options of the KV cache, which every method of the backend gets. Another runtime than transformers has its own, or ()."""

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        own = cls.runtime == "transformers" or "cache_options" in vars(cls)
        if "methods" in vars(cls) and own:
            cls.methods = tuple(replace(m, options=(*m.options, *cls.cache_options)) for m in cls.methods)

    def unavailable(self, variant: Variant | None = None) -> str | None:
        """Why this backend cannot be used here, or why this variant of it cannot be made; or None. Imports nothing heavy."""
        groups = [(self.requires, self.install)]
        if variant is not None and not variant.source:
            groups.append((self.making, self.install_making))
        if variant is not None and dict(variant.options).get(KV_CACHE.name) in KV_CACHE.choices:
            groups.append((("hqq",), "-r requirements-formats.txt"))
        for names, install in groups:
            if missing := [name for name in names if importlib.util.find_spec(name) is None]:
                return f"{', '.join(missing)} is not installed: pip install {install or ' '.join(missing)}"
        return None

    cpu_only: ClassVar[str] = ""
    """Why its variants are computed on the CPU also where there is a GPU; "" where they are not."""

    def needs_cuda(self, variant: Variant) -> bool:
        """Whether the variant runs on an NVIDIA GPU only; a page without one shows it as unavailable."""
        return False

    def here(self) -> list[str]:
        """Lines for the command `variants` on what is possible on this machine. Imports nothing heavy."""
        return []

    def readers(self, quantization: dict[str, Any]) -> list[str]:
        """Names of the methods that load a checkpoint as their source, by what its config.json says of the quantization.

        Every method of the backend for what is in `reads`; a backend whose methods store different types narrows it.
        """
        if packed.method_of(quantization) not in self.reads:
            return []
        return [m.name for m in self.methods if m.takes_source]

    def describe(self, variant: Variant) -> str:
        """The method's name and the options that differ from the defaults, in a few words."""
        options = (f"{name} {value}" for name, value in self.requested(variant).items())
        return ", ".join([self.method(variant.method).title, *options])

    def bits(self, variant: Variant) -> float:
        """Bits of a quantized value, quant state aside; the page groups its list by it."""
        return self.method(variant.method).bits

    def decode_speed(self, variant: Variant, cuda: bool) -> str:
        """`Method.decode` for the variant's options. cuda: on an NVIDIA GPU, else on a CPU."""
        return self.method(variant.method).decode[cuda]

    def offers(self, model: str) -> list[str]:
        """Ready-made notations for one model by its name, beside the methods' presets. Looks at names only."""
        return []

    # ------------------------------------------------------------ options

    def complete(self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None) -> Variant:
        """Fill in what only the model can tell (a group size, say). Raises `UserError` where it does not fit.

        `progress` is called where this takes long (a ready-made checkpoint is downloaded); it may raise `Stopped`.
        """
        return variant

    def with_calibration(self, variant: Variant, source: str | Path | Iterable[str]) -> Variant:
        """The variant with a calibration text in its options: a file, a data set's name, or the texts themselves.
        Unchanged where it takes none. Raises `UserError` where it names another one already."""
        return variant

    # ------------------------------------------------------------ loading

    def silence(self) -> None:
        """Keep the method's libraries out of the terminal where `loggers` is not enough; called before they are
        imported."""

    def prepare(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> None:
        """What is done once and cached (quantizing, compiling a kernel), before load time and load peak are measured."""

    def make(self, checkpoint: Checkpoint, variant: Variant, device: str, progress: Progress) -> Path:
        """The folder of the quantized checkpoint, from the cache or made now; with `makes_checkpoints`."""
        raise NotImplementedError

    def save(
        self,
        checkpoint: Checkpoint,
        variant: Variant,
        placement: Placement,
        target: Path,
        progress: Progress,
        change: Callable[[Any], Any] | None = None,
    ) -> None:
        """Write the variant into the folder `target`, weights and config.json, as loading it again expects them.
        `backends/saving.py` does most of it; the tokenizer's files are not its business.

        change: called with the loaded model, gives the model to write (with an adapter merged). Raises `UserError` where the
        method has no form that can be written, as here.
        """
        raise UserError(
            f"{variant.notation} cannot be written to a folder: {self.name} has no checkpoint format.",
            "Export another variant, for example bf16.",
        )

    def random_layer(self, outputs: int, inputs: int, std: float, generator: Any) -> dict[str, Any]:
        """The stored tensors of a linear layer with random weights of standard deviation `std`, made on the device of
        the torch generator; with `random_config`."""
        raise NotImplementedError

    def tensor_sizes(
        self, variant: Variant, checkpoint: Checkpoint, device: str = ""
    ) -> Iterable[TensorSize]:
        """What the loaded variant will hold, tensor by tensor, from headers alone; never shown as a measurement. `device`:
        "cpu" or "cuda…" counts what its kernel repacks at first use, "" what is there right after loading."""
        raise NotImplementedError

    def needed_bytes(self, variant: Variant, checkpoint: Checkpoint, device: str = "") -> int:
        """Bytes that the loaded variant will hold on its device; used to refuse before loading."""
        return sum(size.bytes for size in self.tensor_sizes(variant, checkpoint, device))

    def workspace_bytes(self, variant: Variant, rows: int, outputs: int, inputs: int, device: str) -> int:
        """What a matmul of `rows` rows takes beside its input and output: the unpacked weight, say."""
        return 0

    def compute_dtype(self, variant: Variant, checkpoint: Checkpoint) -> str:
        """In which activations, keys and values are held."""
        return str(self.requested(variant).get("dtype") or self.values(variant).get("dtype") or "bf16")

    def load(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> LoadedModel:
        """Load the checkpoint as this variant. `transformers_loader.from_pretrained` does most of it.

        `progress` may raise `Stopped`. Raises `UserError` for everything that a person can mend.
        """
        raise NotImplementedError

    # ------------------------------------------------------------ what is stored

    def owns(self, module: Any) -> bool:
        """Whether this backend quantized `module`: its class, or its weight's, is from `libraries`."""
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        return any(self.library_of(value) for value in (module, weight) if value is not None)

    def library_of(self, value: Any) -> str | None:
        """The entry of `libraries` that the value's class comes from, or None."""
        origin = type(value).__module__
        return next((name for name in self.libraries if f"{origin}.".startswith(f"{name}.")), None)

    def stored_values(self, module: Any, parameter: Any) -> Any:
        """The tensor in which the values of `parameter` lie. Another one for a tensor subclass that wraps it (torchao)."""
        return parameter

    def quant_state(self, module: Any) -> dict[str, Any]:
        """Tensors that a quantized weight of `module` needs beside its values: absmax, codebooks, scales, zeros …

        Empty for a module that this backend did not quantize.
        """
        return {}

    def logical(self, module: Any, parameter: Any) -> Logical | None:
        """What the stored `parameter` of `module` means; None where storage and meaning are the same."""
        return None

    def dequantize(self, module: Any) -> Any | None:
        """The weight (out, in) of a module that this backend quantized, as a float32 tensor; None otherwise."""
        return None

    # ------------------------------------------------------------ decoding: asked about modules that it `owns`

    def on_parallel_streams(self, module: Any) -> bool:
        """Whether the module's matmul of one row may run beside others on a CUDA stream of its own: a short kernel that
        reads packed weights, launches on torch's current stream and uses no shared workspace."""
        return False

    def opaque(self, module: Any) -> bool:
        """Whether torch.compile must not look into the module's forward. It then becomes one custom operation
        (x) → (…, module.out_features)."""
        return False

    def deterministic(self, module: Any) -> bool:
        """Whether the module gives the same bits each time on the same input."""
        return True

    def graph_refusal(self, module: Any) -> str | None:
        """Why no CUDA graph can hold this module, as a clause; None where one can."""
        return None

    def capture_forward(self, module: Any, rows: int = 1) -> Callable[[Any], Any] | None:
        """Where the module's forward waits for the device, has shapes that depend on the data, or unpacks its weight: a forward
        (…, inputs) → (…, outputs) for so many rows that a CUDA graph can hold, used while decoding in a graph. It is compared
        with the module's own on real activations first. None: the module's own is captured."""
        return None

    def capture_note(self, module: Any) -> str:
        """A note for the column where `capture_forward` replaced the module's forward: how it differs from the library's."""
        return ""

    # ------------------------------------------------------------ adapters and training

    def check_adapter(self, variant: Variant, adapter: AdapterKind) -> None:
        """Raises `UserError` for an adapter that cannot be put on (or merged into) this variant."""

    def reading_state_dict(self, model: Any) -> contextlib.AbstractContextManager[Any]:
        """Open while `model.state_dict()` is read, where the library changes its weights for that."""
        return contextlib.nullcontext()

    def training(self, variant: Variant, device: str) -> Training:
        """How a LoRA is trained on this variant on `device`. Raises `UserError` where it is not, as here."""
        raise UserError(
            f"No adapter can be trained on {variant.method}.",
            "Train it on bf16 or another base; it can be used here afterwards if peft takes these layers.",
        )

    def training_variants(self, variant: Variant, device: str) -> list[tuple[Variant, tuple[str, ...]]]:
        """The variants to train on in place of this one, best first, each with notes on what differs: where a kernel
        has no gradients, say. The next is loaded where one raises `UserError`."""
        return [(variant, ())]

    def training_bytes(self, variant: Variant, checkpoint: Checkpoint) -> int:
        """As `needed_bytes`, of the base as it is trained on."""
        return self.needed_bytes(variant, checkpoint)

    def prepare_for_training(self, model: Any) -> None:
        """Change what stands in the way of gradients, after peft's own preparation."""

    # ------------------------------------------------------------ code to copy

    def code(
        self,
        variant: Variant,
        placement: Placement,
        *,
        layers: tuple[LayerRow, ...] = (),
        kernel: str | None = None,
    ) -> tuple[list[str], list[str], list[str]]:
        """Plain transformers code that loads the same: (import lines, set-up lines, keyword arguments of
        `from_pretrained` as source text). `layers`: the column's layer rows.
        `kernel`: what multiplied, as the column names it."""
        raise UserError(f"There is no code to copy for {variant.method}: {self.runtime} executes it.")

    def code_weights(self, variant: Variant) -> str | None:
        """Source text of what `from_pretrained` loads, where that is not the comparison's own model."""
        return repr(variant.source) if variant.source else None

    def code_comment(self, variant: Variant, model: str) -> list[str]:
        """Comment lines above the set-up: what has to be done first. Quotes nothing unescaped."""
        return []

    def code_after(self, variant: Variant, layers: tuple[LayerRow, ...]) -> list[str]:
        """Lines of plain code to run after `from_pretrained`, where this backend had to do more to make it run."""
        return []
