"""GPTQ: 2 to 8 bits per weight, rounded with a calibration text; quantized on the spot or loaded ready-made.

Loading itself is transformers' own (through optimum and gptqmodel).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from comparator.backends import calibration, dtypes, transformers_loader
from comparator.backends import ready_made as sources
from comparator.backends.base import LoadedModel, Method, Option, Placement, Progress, QuantizedType
from comparator.backends.gptq import random_layer, ready_made
from comparator.backends.gptq.kernels import KERNELS
from comparator.backends.gptq.layer import Recipe
from comparator.backends.gptqmodel_layers import kernels, on_the_spot, shapes
from comparator.backends.gptqmodel_layers.backend import PackedLayers
from comparator.backends.gptqmodel_layers.kernels import Packed
from comparator.core.errors import UserError
from comparator.core.variant import Variant, sort_options
from comparator.sources import Checkpoint
from comparator.util.compat import gptqmodel

_BITS, _GROUPS = ("2", "3", "4", "8"), ("-1", "32", "64", "128")
_OPTIONS = (
    Option("bits", "bits per weight", "4", choices=_BITS, form="{value}bit"),
    Option("group", "weights that share a scale and a zero point; -1: a whole row. Default: the largest of 128, 64 and 32 that divides every layer", None, choices=_GROUPS, form="g{value}"),
    Option("desc_act", "round the columns with the largest activations first (act-order); a little better, a little "
           "slower", "false", kind="flag", form="{name}"),
    Option("sym", "levels lie symmetrically around zero; sym=false stores a zero point per group", "true",
           choices=("true", "false")),
    Option("damp", "added to the diagonal of the Hessian, as a share of its mean", "0.1", kind="number",
           minimum=0.0001, maximum=0.9999),
    Option("cal", "calibration text: c4 or wikitext2 from the Hub, or the hash of a text of your own, which --calibration FILE stores. Default: the bundled text", None, kind="text"),
    Option("kernel", "what multiplies the packed weights. auto: the fastest that is ready, without compiling",
           "auto", choices=("auto", *KERNELS.names)),
    Option("dtype", "dtype of the activations and of what stays unquantized", "fp16", choices=("fp16", "bf16")),
)  # fmt: skip


class Gptq(PackedLayers):
    name = "gptq"
    title = "GPTQ"
    method_name = "gptq"
    kernels = KERNELS
    decided = ("bits", "group", "desc_act", "sym")
    types = tuple(QuantizedType(f"int{bits} (GPTQ)", int(bits)) for bits in _BITS)
    calibration_option = "cal"
    reads = ("gptq",)
    makes_checkpoints = True
    random_config = random_layer.CONFIG
    methods = (
        Method("gptq", "calibrated rounding", "2 to 8 bits per weight; each column is rounded so that the next ones compensate its "
               "error on a calibration text. Quantized here (once, then cached), or ready-made: gptq@user/repo.",
               _OPTIONS, takes_source=True, precision=40, bits=4, presets=("gptq",), decode=("faster", "depends on the kernel")),
    )  # fmt: skip

    def __init__(self):
        self._opened: dict[tuple[str | None, str | None], ready_made.ReadyMade] = {}

    # ------------------------------------------------------------ options

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        calibration.check_name(values["cal"])
        if values["bits"] and values["kernel"] != "auto":
            kernel = KERNELS[values["kernel"]]
            if int(values["bits"]) not in kernel.bits:
                bits = " or ".join(map(str, kernel.bits))
                raise UserError(
                    f"The kernel {kernel.name} takes {bits} bits, not {values['bits']}.", "Leave kernel= out."
                )

    def canonical(self, variant: Variant) -> Variant:
        """`g64` alone means 4 bits, so it is written `4bit,g64`; `4bit` alone is what gptq is anyway."""
        result, named = super().canonical(variant), self.requested(variant)
        if result.source or "group" not in named:
            return result
        return self.with_options(result, {"bits": named.get("bits", "4")})

    def with_options(self, variant: Variant, settings: dict[str, str | None]) -> Variant:
        """The variant with these options written out, or taken out where None."""
        written = {**self.requested(variant), **settings}
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
            return self.with_options(variant, options)
        if checkpoint.model_type == "gpt2":
            raise UserError(
                f"transformers cannot load a GPTQ-quantized {checkpoint.architecture}: preparing its layers fails.",
                "Use nf4 or int8 for this model.",
            )
        shapes.require_full_precision(checkpoint, self.title, variant.method)
        group = int(requested["group"]) if "group" in requested else None
        return self.with_options(
            variant,
            {"bits": requested.get("bits", "4"), "group": str(shapes.group_size(checkpoint, group))},
        )

    def opened(self, variant: Variant) -> Checkpoint:
        return self._ready(variant).checkpoint

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

    def prepare(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> None:
        packed = self.packed(variant, checkpoint)
        kernel = self.kernel(variant, packed, placement)  # refuses before minutes of work
        if not variant.source:
            self.make(checkpoint, variant, placement.device, progress)
        kernels.prepare(kernel, packed, progress)

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
        packed = self.packed(variant, checkpoint)
        kernel = self.kernel(variant, packed, placement)
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
        return self.loaded(model, variant, notes)

    def _ready(self, variant: Variant) -> ready_made.ReadyMade:
        """What `complete` looked at last: asking the Hub once a run is enough."""
        key = (variant.source, variant.revision)
        if key not in self._opened:
            self._opened[key] = ready_made.open_ready(variant)
        return self._opened[key]

    def packed(self, variant: Variant, checkpoint: Checkpoint) -> Packed:
        dtype = self.values(variant)["dtype"]
        if variant.source:
            return self._ready(variant).packed(dtype)
        recipe = self.recipe(self.complete(variant, checkpoint))
        sizes = frozenset((layer.inputs, layer.outputs) for layer in shapes.layers(checkpoint))
        return Packed(recipe.bits, recipe.group_size, recipe.desc_act, recipe.sym, dtype, sizes)

    # ------------------------------------------------------------ what is stored

    def dequantize(self, module: Any) -> Any | None:
        if not self.is_quantized(module):
            return None
        from comparator.backends.gptq import unpack

        return unpack.weight(module)

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        values = self.values(variant)
        ran = self.kernel_that_ran(variant, kernel)
        bits, backend = int(values["bits"]), ran.backend if ran else "auto"
        return (
            ["from transformers import GPTQConfig"],
            [f"quantization = GPTQConfig(bits={bits}, backend={backend!r})"],
            [f"dtype={dtypes.torch_name(values['dtype'])}", "quantization_config=quantization"],
        )

    def code_weights(self, variant: Variant) -> str | None:
        return repr(variant.source or on_the_spot.folder_name(variant))

    def code_comment(self, variant: Variant, model: str) -> list[str]:
        return [] if variant.source else on_the_spot.code_comment(variant, model, self.title)


def _cache_dir() -> Path:
    from comparator.core.settings import get_settings

    return get_settings().cache_dir
