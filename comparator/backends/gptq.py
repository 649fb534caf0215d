"""GPTQ: 2 to 8 bits a weight, rounded with a calibration text; made on the spot or loaded ready-made.

Puts together what `comparator/gptq/` holds: recipes and calibration, the cache of what was made here, ready-made
checkpoints, kernels. Loading itself is transformers' own (through optimum and gptqmodel).
"""

from __future__ import annotations

import os
import shlex
import warnings
from pathlib import Path
from typing import Any

from comparator.backends import loading
from comparator.backends.base import Backend, LoadedModel, Logical, Method, Option, Placement, Progress
from comparator.gptq import calibration, kernels, made, order, ready, shapes, streams
from comparator.gptq.kernels import Packed
from comparator.gptq.layer import Recipe
from comparator.notation import sort_options
from comparator.sources import Checkpoint
from comparator.types import Problem, Variant

_BITS, _GROUPS = ("2", "3", "4", "8"), ("-1", "32", "64", "128")
_OPTIONS = (
    Option("bits", "bits a weight", "4", choices=_BITS, form="{value}bit"),
    Option("group", "weights that share a scale and a zero point; -1: a whole row. Left out: the largest of 128, 64 "
           "and 32 that divides every layer", None, choices=_GROUPS, form="g{value}"),
    Option("desc_act", "round the columns with the largest activations first (act-order); a little better, a little "
           "slower", "false", kind="flag", form="{name}"),
    Option("sym", "levels lie symmetrically around zero; sym=false spends a zero point a group", "true",
           choices=("true", "false")),
    Option("damp", "added to the diagonal of the Hessian, as a share of its mean", "0.1", kind="number",
           minimum=0.0001, maximum=0.9999),
    Option("cal", "calibration text: c4 or wikitext2 from the Hub, or the hash of a text of your own, which "
           "--calibration FILE takes in. Left out: the text that comes with this project", None, kind="text"),
    Option("kernel", "what multiplies the packed weights. auto: the fastest that is ready, without compiling",
           "auto", choices=("auto", *kernels.NAMES)),
    Option("dtype", "dtype of the activations and of what stays unquantized", "fp16", choices=("fp16", "bf16")),
)  # fmt: skip
_FROM_CHECKPOINT = ("bits", "group", "desc_act", "sym")


class Gptq(Backend):
    name = "gptq"
    requires = ("torch", "transformers", "gptqmodel", "optimum")
    methods = (
        Method("gptq", "GPTQ", "2 to 8 bits a weight; each column is rounded so that the next ones make up for its "
               "error on a calibration text. Made on the spot (once, then kept), or ready-made: gptq@user/repo.",
               _OPTIONS, takes_source=True, precision=40, bits=4, presets=("gptq",)),
    )  # fmt: skip

    def __init__(self):
        self._found: dict[tuple[str | None, str | None], ready.Ready] = {}

    # ------------------------------------------------------------ options

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        if values["cal"] and not calibration.is_name(values["cal"]):
            raise Problem(
                f"cal={values['cal']} names no calibration.",
                "cal= takes c4, wikitext2, or the eight hex digits of a text of your own; --calibration FILE takes "
                "the text in and puts them there.",
            )
        if values["bits"] and values["kernel"] != "auto":
            kernel = kernels.BY_NAME[values["kernel"]]
            if int(values["bits"]) not in kernel.bits:
                bits = " or ".join(map(str, kernel.bits))
                raise Problem(
                    f"The kernel {kernel.name} takes {bits} bits, not {values['bits']}.", "Leave kernel= out."
                )

    def canonical(self, variant: Variant) -> Variant:
        """`g64` alone means 4 bits, so it is written `4bit,g64`; `4bit` alone is what gptq is anyway.

        With a source everything that is named stays, since it may contradict the checkpoint.
        """
        result, named = super().canonical(variant), self.given(variant)
        if result.source:
            return self._with(result, **{n: v for n, v in named.items() if n in _FROM_CHECKPOINT})
        return self._with(result, bits=named.get("bits", "4")) if "group" in named else result

    def _with(self, variant: Variant, **values: str | None) -> Variant:
        """The variant with these options written out, or taken out where None."""
        written = {**self.given(variant), **values}
        tokens: dict[str, str | None] = {}
        for option in self.methods[0].options:
            if (value := written.get(option.name)) is not None and (value, option.kind) != ("false", "flag"):
                key, equals, rest = option.form.format(name=option.name, value=value).partition("=")
                tokens[key] = rest if equals else None
        return Variant(variant.method, variant.source, variant.revision, sort_options(tokens))

    def complete(self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None) -> Variant:
        given = self.given(variant)
        if variant.source:
            found = self._found[variant.source, variant.revision] = ready.open_ready(variant, progress)
            ready.check_wishes(found, given)
            ready.check_same_model(found, checkpoint)
            said = {
                "bits": str(found.bits),
                "group": str(found.group_size) if str(found.group_size) in _GROUPS else None,
                "desc_act": "true" if found.desc_act else None,
                "sym": None if found.sym else "false",
            }
            return self._with(variant, **said)
        if checkpoint.model_type == "gpt2":
            raise Problem(
                f"transformers cannot load a GPTQ-quantized {checkpoint.architecture}: preparing its layers fails.",
                "Use nf4 or int8 for this model.",
            )
        if checkpoint.quantization:
            method = checkpoint.quantization.get("quant_method", "another method")
            raise Problem(
                f"{checkpoint.source} is quantized already ({method}), and GPTQ starts from full precision.",
                "Choose the full-precision model as the comparison's model, and this one as gptq@"
                f"{checkpoint.source}.",
            )
        wish = int(given["group"]) if "group" in given else None
        return self._with(
            variant, bits=given.get("bits", "4"), group=str(shapes.group_size(checkpoint, wish))
        )

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
        from comparator.gptq import quiet

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

    def make(self, checkpoint: Checkpoint, variant: Variant, device: str, progress: Progress) -> Path:
        """The folder of the quantized checkpoint, from the cache or made now."""
        variant = self.complete(variant, checkpoint)
        return made.make(
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
            order.patch()
        if values["dtype"] == "bf16" and not loading.supports_bf16(placement.device):
            raise Problem("This GPU has no bf16.", "Leave dtype= out: gptq computes in fp16.")
        if variant.source:
            found = self._ready(variant)
            path = ready.for_transformers(found, _cache_dir())
            notes += filter(None, [ready.tokenizer_note(found, checkpoint)])
            if str(found.group_size) not in _GROUPS:
                notes.append(f"Its groups have {found.group_size} weights.")
        else:
            path = self.make(checkpoint, variant, placement.device, progress)
        with warnings.catch_warnings():
            # That the checkpoint's own bits win over those passed here, which are the same.
            warnings.simplefilter("ignore")
            model = loading.from_pretrained(
                replace(checkpoint, path=path, source=variant.source or checkpoint.source, lent=None),
                placement,
                progress,
                dtype=values["dtype"],
                quantization_config=GPTQConfig(bits=packed.bits, backend=kernel.backend),
            )
        classes = _quantized(model)
        if not classes:
            raise Problem(
                f"transformers loaded {variant.notation} without a GPTQ layer.",
                "The checkpoint's layer names do not match this architecture: use another one.",
            )
        for module in classes:
            # gptqmodel wraps this method in torch.compile; as the class has it, nothing compiles behind one's back.
            vars(module).pop("dequantize_weight", None)
        names = sorted({type(module).__name__ for module in classes})
        return LoadedModel(model, f"gptqmodel {' + '.join(names)}", notes)

    def _ready(self, variant: Variant) -> ready.Ready:
        """What `complete` looked at last: asking the Hub once a run is enough."""
        key = (variant.source, variant.revision)
        if key not in self._found:
            self._found[key] = ready.open_ready(variant)
        return self._found[key]

    def _packed(self, variant: Variant, checkpoint: Checkpoint) -> Packed:
        dtype = self.values(variant)["dtype"]
        if variant.source:
            return self._ready(variant).packed(dtype)
        recipe = self.recipe(self.complete(variant, checkpoint))
        sizes = frozenset((layer.inputs, layer.outputs) for layer in shapes.layers(checkpoint))
        return Packed(recipe.bits, recipe.group_size, recipe.desc_act, recipe.sym, dtype, sizes)

    def _kernel(self, variant: Variant, packed: Packed, placement: Placement) -> kernels.Kernel:
        if placement.device.startswith("cuda"):
            streams.patch(_cache_dir())  # before it is asked what is compiled already
        spread = bool(placement.max_memory and "cpu" in placement.max_memory)
        spread = spread and placement.device.startswith("cuda")
        return kernels.choose(self.values(variant)["kernel"], packed, placement.device, spread)

    # ------------------------------------------------------------ what is stored

    def quant_state(self, module: Any) -> dict[str, Any]:
        """Scales, zeros and g_idx; and, once a CPU kernel has rearranged them, what it multiplies with instead."""
        if not _is_quantized(module):
            return {}
        found: dict[str, Any] = {}
        for name in ("qzeros", "scales", "g_idx", "scales_and_zeros", "ret_idx"):
            tensor = getattr(module, name, None)
            if tensor is not None and hasattr(tensor, "untyped_storage"):
                found[name] = tensor
        return found

    def logical(self, module: Any, parameter: Any) -> Logical | None:
        if not _is_quantized(module):
            return None
        shape = (module.out_features, module.in_features)
        compute = "bf16" if type(module).__name__ == "TorchAtenLinear" else None
        if _same(parameter, getattr(module, "qweight", None)):
            scales = getattr(module, "scales", None)
            compute = compute or (loading.short_name(scales.dtype) if scales is not None else "fp16")
            return Logical(f"int{module.bits} (GPTQ)", shape, compute)
        return None

    def dequantize(self, module: Any) -> Any | None:
        if not _is_quantized(module):
            return None
        from comparator.gptq import unpack

        return unpack.weight(module)

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, tied: bool = False, kernel: str | None = None):
        values = self.values(variant)
        ran = next((k for k in kernels.KERNELS if kernel and kernel.endswith(k.class_name)), None)
        ran = ran or kernels.BY_NAME.get(values["kernel"])
        bits, backend = int(values["bits"]), ran.backend if ran else "auto"
        return (
            ["from transformers import GPTQConfig"],
            [f"quantization = GPTQConfig(bits={bits}, backend={backend!r})"],
            [f"dtype={loading.torch_name(values['dtype'])}", "quantization_config=quantization"],
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


def _quantized(model: Any) -> list[Any]:
    return [m for m in model.modules() if _is_quantized(m)]


def _cache_dir() -> Path:
    from comparator.settings import get_settings

    return get_settings().cache_dir
