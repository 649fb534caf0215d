"""GPTQ: 2 to 8 bits per weight, rounded with a calibration text; quantized on the spot or loaded ready-made.

Loading itself is transformers' own (through optimum and gptqmodel).
"""

from __future__ import annotations

import os
import shlex
import warnings
from pathlib import Path
from typing import Any

from comparator.backends import calibration, dtypes, transformers_loader
from comparator.backends import ready_made as sources
from comparator.backends.base import (
    AdapterKind,
    Backend,
    LoadedModel,
    Logical,
    Method,
    Option,
    Placement,
    Progress,
    QuantizedType,
    Training,
)
from comparator.backends.gptq import kernels, on_the_spot, random_layer, ready_made, shapes
from comparator.backends.gptq.kernels import Packed
from comparator.backends.gptq.layer import Recipe
from comparator.core.errors import UserError
from comparator.core.variant import Variant, sort_options
from comparator.sources import Checkpoint, packed
from comparator.util.compat import gptqmodel

_BITS, _GROUPS = ("2", "3", "4", "8"), ("-1", "32", "64", "128")
_OPTIONS = (
    Option("bits", "bits per weight", "4", choices=_BITS, form="{value}bit"),
    Option("group", "weights that share a scale and a zero point; -1: a whole row. Left out: the largest of 128, 64 "
           "and 32 that divides every layer", None, choices=_GROUPS, form="g{value}"),
    Option("desc_act", "round the columns with the largest activations first (act-order); a little better, a little "
           "slower", "false", kind="flag", form="{name}"),
    Option("sym", "levels lie symmetrically around zero; sym=false stores a zero point per group", "true",
           choices=("true", "false")),
    Option("damp", "added to the diagonal of the Hessian, as a share of its mean", "0.1", kind="number",
           minimum=0.0001, maximum=0.9999),
    Option("cal", "calibration text: c4 or wikitext2 from the Hub, or the hash of a text of your own, which "
           "--calibration FILE takes in. Left out: the bundled text", None, kind="text"),
    Option("kernel", "what multiplies the packed weights. auto: the fastest that is ready, without compiling",
           "auto", choices=("auto", *kernels.NAMES)),
    Option("dtype", "dtype of the activations and of what stays unquantized", "fp16", choices=("fp16", "bf16")),
)  # fmt: skip
_EXLLAMA = "ExllamaV2Linear"
_FROM_CHECKPOINT = ("bits", "group", "desc_act", "sym")


class Gptq(Backend):
    name = "gptq"
    requires = ("torch", "transformers", "gptqmodel", "optimum")
    libraries = ("gptqmodel",)
    weight_name = "qweight"
    types = tuple(QuantizedType(f"int{bits} (GPTQ)", int(bits)) for bits in _BITS)
    calibration_option = "cal"
    reads = ("gptq",)
    makes_checkpoints = True
    random_config = random_layer.CONFIG
    methods = (
        Method("gptq", "calibrated rounding", "2 to 8 bits per weight; each column is rounded so that the next ones compensate its "
               "error on a calibration text. Made on the spot (once, then kept), or ready-made: gptq@user/repo.",
               _OPTIONS, takes_source=True, precision=40, bits=4, presets=("gptq",)),
    )  # fmt: skip

    def __init__(self):
        self._opened: dict[tuple[str | None, str | None], ready_made.ReadyMade] = {}

    # ------------------------------------------------------------ options

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        if values["cal"] and not calibration.is_name(values["cal"]):
            raise UserError(
                f"cal={values['cal']} names no calibration.",
                "cal= takes c4, wikitext2, or the eight hex digits of a text of your own; --calibration FILE takes "
                "the text in and puts them there.",
            )
        if values["bits"] and values["kernel"] != "auto":
            kernel = kernels.BY_NAME[values["kernel"]]
            if int(values["bits"]) not in kernel.bits:
                bits = " or ".join(map(str, kernel.bits))
                raise UserError(
                    f"The kernel {kernel.name} takes {bits} bits, not {values['bits']}.", "Leave kernel= out."
                )

    def canonical(self, variant: Variant) -> Variant:
        """`g64` alone means 4 bits, so it is written `4bit,g64`; `4bit` alone is what gptq is anyway.

        With a source everything that is named stays, since it may contradict the checkpoint.
        """
        result, named = super().canonical(variant), self.requested(variant)
        if result.source:
            return self._with(result, **{n: v for n, v in named.items() if n in _FROM_CHECKPOINT})
        return self._with(result, bits=named.get("bits", "4")) if "group" in named else result

    def _with(self, variant: Variant, **values: str | None) -> Variant:
        """The variant with these options written out, or taken out where None."""
        written = {**self.requested(variant), **values}
        tokens: dict[str, str | None] = {}
        for option in self.methods[0].options:
            if (value := written.get(option.name)) is not None and (value, option.kind) != ("false", "flag"):
                key, equals, rest = option.form.format(name=option.name, value=value).partition("=")
                tokens[key] = rest if equals else None
        return Variant(variant.method, variant.source, variant.revision, sort_options(tokens))

    def complete(self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None) -> Variant:
        requested = self.requested(variant)
        if variant.source:
            ready = self._opened[variant.source, variant.revision] = ready_made.open_ready(variant, progress)
            ready_made.check_options(ready, requested)
            sources.check_same_model(ready.checkpoint, checkpoint)
            options = {
                "bits": str(ready.bits),
                "group": str(ready.group_size) if str(ready.group_size) in _GROUPS else None,
                "desc_act": "true" if ready.desc_act else None,
                "sym": None if ready.sym else "false",
            }
            return self._with(variant, **options)
        if checkpoint.model_type == "gpt2":
            raise UserError(
                f"transformers cannot load a GPTQ-quantized {checkpoint.architecture}: preparing its layers fails.",
                "Use nf4 or int8 for this model.",
            )
        if checkpoint.quantization:
            method = packed.method_of(checkpoint.quantization)
            raise UserError(
                f"{checkpoint.source} is quantized already ({method}), and GPTQ starts from full precision.",
                "Choose the full-precision model as the comparison's model, and this one as gptq@"
                f"{checkpoint.source}.",
            )
        group = int(requested["group"]) if "group" in requested else None
        return self._with(
            variant, bits=requested.get("bits", "4"), group=str(shapes.group_size(checkpoint, group))
        )

    def with_calibration(self, variant: Variant, source: Any) -> Variant:
        return variant if variant.source else calibration.applied_to(variant, source)

    def recipe(self, variant: Variant) -> Recipe:
        """Of a completed variant that is made on the spot."""
        values = self.values(variant)
        return Recipe(
            bits=int(values["bits"]),
            group_size=int(values["group"]),
            desc_act=values["desc_act"] == "true",
            sym=values["sym"] == "true",
            damp=float(values["damp"]),
        )

    # ------------------------------------------------------------ loading

    def here(self) -> list[str]:
        return kernels.possible()

    def silence(self) -> None:
        from comparator.backends.gptq import quiet

        quiet.silence()

    def needed_bytes(self, variant: Variant, checkpoint: Checkpoint) -> int:
        if variant.source:
            return sum(t.bytes for t in self._ready(variant).checkpoint.tensors)
        variant = self.complete(variant, checkpoint)
        recipe = self.recipe(variant)
        return shapes.packed_bytes(checkpoint, recipe.bits, recipe.group_size)

    def prepare(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> None:
        packed = self._packed(variant, checkpoint)
        kernel = self._kernel(variant, packed, placement)  # refuses before minutes of work
        if not variant.source:
            self.make(checkpoint, variant, placement.device, progress)
        kernels.prepare(kernel, packed, placement.device, progress)

    def random_layer(self, outputs: int, inputs: int, std: float, generator: Any) -> dict[str, Any]:
        return random_layer.tensors(outputs, inputs, std, generator)

    def make(self, checkpoint: Checkpoint, variant: Variant, device: str, progress: Progress) -> Path:
        variant = self.complete(variant, checkpoint)
        return on_the_spot.make(
            checkpoint, self.recipe(variant), self.values(variant)["cal"], _cache_dir(), device, progress
        )

    def load(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> LoadedModel:
        from dataclasses import replace

        from transformers import GPTQConfig

        if os.environ.get("SPACES_ZERO_GPU"):  # there transformers' background loading meets no GPU
            os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
        values, notes = self.values(variant), []
        packed = self._packed(variant, checkpoint)
        kernel = self._kernel(variant, packed, placement)
        if kernel.name == "exllama_v2":
            gptqmodel.skip_row_table()
        if values["dtype"] == "bf16" and not dtypes.supports_bf16(placement.device):
            raise UserError("This GPU has no bf16.", "Leave dtype= out: gptq computes in fp16.")
        if variant.source:
            ready = self._ready(variant)
            path = ready_made.for_transformers(ready, _cache_dir())
            notes += sources.tokenizer_note(ready.checkpoint, checkpoint) + sources.left_over_note(
                ready.checkpoint
            )
            if str(ready.group_size) not in _GROUPS:
                notes.append(f"Its groups have {ready.group_size} weights.")
        else:
            path = self.make(checkpoint, variant, placement.device, progress)
        with warnings.catch_warnings():
            # That the checkpoint's own bits win over those passed here, which are the same.
            warnings.simplefilter("ignore")
            model = transformers_loader.from_pretrained(
                replace(checkpoint, path=path, source=variant.source or checkpoint.source, lent=None),
                placement,
                progress,
                dtype=values["dtype"],
                quantization_config=GPTQConfig(bits=packed.bits, backend=kernel.backend),
            )
        layers = [m for m in model.modules() if _is_quantized(m)]
        if not layers:
            raise UserError(
                f"transformers loaded {variant.notation} without a GPTQ layer.",
                "The checkpoint's layer names do not match this architecture: use another one.",
            )
        for module in layers:
            # gptqmodel wraps this method in torch.compile, which would compile at the first forward; the class's own.
            vars(module).pop("dequantize_weight", None)
        names = sorted({type(module).__name__ for module in layers})
        return LoadedModel(model, f"gptqmodel {' + '.join(names)}", notes)

    def _ready(self, variant: Variant) -> ready_made.ReadyMade:
        """What `complete` looked at last: asking the Hub once a run is enough."""
        key = (variant.source, variant.revision)
        if key not in self._opened:
            self._opened[key] = ready_made.open_ready(variant)
        return self._opened[key]

    def _packed(self, variant: Variant, checkpoint: Checkpoint) -> Packed:
        dtype = self.values(variant)["dtype"]
        if variant.source:
            return self._ready(variant).packed(dtype)
        recipe = self.recipe(self.complete(variant, checkpoint))
        sizes = frozenset((layer.inputs, layer.outputs) for layer in shapes.layers(checkpoint))
        return Packed(recipe.bits, recipe.group_size, recipe.desc_act, recipe.sym, dtype, sizes)

    def _kernel(self, variant: Variant, packed: Packed, placement: Placement) -> kernels.Kernel:
        if placement.device.startswith("cuda"):
            gptqmodel.launch_on_stream(_cache_dir())  # before it is asked what is compiled already
        spread = bool(placement.max_memory and "cpu" in placement.max_memory)
        spread = spread and placement.device.startswith("cuda")
        return kernels.choose(self.values(variant)["kernel"], packed, placement.device, spread)

    # ------------------------------------------------------------ what is stored

    def quant_state(self, module: Any) -> dict[str, Any]:
        """Scales, zeros and g_idx; and, once a CPU kernel has rearranged them, what it multiplies with instead."""
        if not _is_quantized(module):
            return {}
        state: dict[str, Any] = {}
        for name in ("qzeros", "scales", "g_idx", "scales_and_zeros", "ret_idx"):
            tensor = getattr(module, name, None)
            if tensor is not None and hasattr(tensor, "untyped_storage"):
                state[name] = tensor
        return state

    def logical(self, module: Any, parameter: Any) -> Logical | None:
        if not _is_quantized(module):
            return None
        shape = (module.out_features, module.in_features)
        compute = "bf16" if type(module).__name__ == "TorchAtenLinear" else None
        if _same(parameter, getattr(module, "qweight", None)):
            scales = getattr(module, "scales", None)
            compute = compute or (dtypes.short_name(scales.dtype) if scales is not None else "fp16")
            return Logical(f"int{module.bits} (GPTQ)", shape, compute)
        return None

    def dequantize(self, module: Any) -> Any | None:
        if not _is_quantized(module):
            return None
        from comparator.backends.gptq import unpack

        return unpack.weight(module)

    # ------------------------------------------------------------ decoding

    def on_parallel_streams(self, module: Any) -> bool:
        """gptqmodel's torch kernels unpack the weights and multiply with cuBLAS, which would take a workspace for each
        stream and fills the card by itself."""
        return hasattr(module, "qweight") and not type(module).__name__.startswith("Torch")

    def opaque(self, module: Any) -> bool:
        """ExLlamaV2's kernel writes into a buffer without declaring it; torch.compile takes the call for one without
        effect and drops it: 753 tok/s on an H100 whose memory bandwidth allows 641."""
        return hasattr(module, "out_features") and hasattr(module, "qweight")

    def deterministic(self, module: Any) -> bool:
        """ExLlamaV2 adds with atomic operations in fp16, in whatever order its blocks finish."""
        return type(module).__name__ != _EXLLAMA

    def graph_refusal(self, module: Any) -> str | None:
        if type(module).__name__ == _EXLLAMA and not gptqmodel.follows_stream():
            return "ExLlamaV2 launches its kernels on CUDA's default stream, which a graph does not see"
        return None

    # ------------------------------------------------------------ adapters and training

    def check_adapter(self, variant: Variant, adapter: AdapterKind) -> None:
        if adapter.merged:
            raise UserError(
                "GPTQ weights cannot take a merge: they are fixed 4-bit codes, and changing one means quantizing the layer "
                "again with calibration data.",
                f"Leave :merged out ({adapter.source} works unmerged on GPTQ), or merge on bf16 and quantize that.",
            )
        if adapter.peft_type in ("LOHA", "LOKR", "IA3"):
            raise UserError(
                f"{adapter.source} is {adapter.kind}, and peft has no {adapter.kind} for GPTQ layers: it would take the "
                "packed bytes for the weights.",
                "Use bf16 or int8 for this adapter, or a LoRA, which every variant takes.",
            )
        if adapter.dora:
            raise UserError(
                f"{adapter.source} is {adapter.kind}, and peft has no DoRA for GPTQ layers: DoRA needs the norm of the "
                "unpacked weight.",
                "Use another variant for this adapter (nf4 has the same size), or a LoRA without DoRA.",
            )

    def training(self, variant: Variant, device: str) -> Training:
        return Training(dtype=self.values(variant)["dtype"])

    def training_variants(self, variant: Variant, device: str) -> list[tuple[Variant, tuple[str, ...]]]:
        """Triton's and torch's kernels have gradients."""
        kernel = self.values(variant)["kernel"]
        usable = ["triton", "torch"] if device.startswith("cuda") else ["torch"]
        if kernel in usable:
            return [(variant, ())]
        choices, notes = [], ()
        for number, name in enumerate(usable):
            if number:
                notes = (*notes, f"Trained with the kernel {name}: {usable[0]} cannot be used here.")
            elif kernel not in ("auto", name):
                notes = (f"Trained with the kernel {name}: {kernel} has no gradients.",)
            choices.append((self._with(variant, kernel=name), notes))
        return choices

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        values = self.values(variant)
        ran = next((k for k in kernels.KERNELS if kernel and kernel.endswith(k.class_name)), None)
        ran = ran or kernels.BY_NAME.get(values["kernel"])
        bits, backend = int(values["bits"]), ran.backend if ran else "auto"
        return (
            ["from transformers import GPTQConfig"],
            [f"quantization = GPTQConfig(bits={bits}, backend={backend!r})"],
            [f"dtype={dtypes.torch_name(values['dtype'])}", "quantization_config=quantization"],
        )

    def code_weights(self, variant: Variant) -> str | None:
        return repr(variant.source or _folder_name(variant))

    def code_comment(self, variant: Variant, model: str) -> list[str]:
        if variant.source:
            return []
        command = ["python", "-m", "comparator", "quantize", "--model", model, "--variant", variant.notation]
        command += ["--output", _folder_name(variant)]
        return [
            "# GPTQ rounds once and keeps the result. This writes the folder, at once where it was made before:",
            f"#   {ascii(shlex.join(command))[1:-1]}",
        ]


def _same(tensor: Any, own: Any) -> bool:
    """Whether a stored tensor is the module's own; with an offloaded module that holds a placeholder only."""
    if own is None or tensor is own:
        return tensor is own
    return own.device.type == "meta" and (tensor.shape, tensor.dtype) == (own.shape, own.dtype)


def _folder_name(variant: Variant) -> str:
    return variant.notation.replace(":", "-").replace(",", "-").replace("=", "-")


def _is_quantized(module: Any) -> bool:
    return type(module).__module__.startswith("gptqmodel.nn_modules.qlinear") and hasattr(module, "bits")


def _cache_dir() -> Path:
    from comparator.core.settings import get_settings

    return get_settings().cache_dir
