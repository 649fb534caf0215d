"""AWQ: 4 bits per weight, rounded after its columns were scaled by what a calibration text puts in; made on the spot or
loaded ready-made.

Loading itself is transformers' own (through gptqmodel).
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparator.backends import calibration, dtypes, transformers_loader
from comparator.backends import ready_made as sources
from comparator.backends.awq import random_layer, ready_made
from comparator.backends.awq.kernels import KERNELS
from comparator.backends.awq.layer import Recipe
from comparator.backends.base import LoadedModel, Method, Option, Placement, Progress, QuantizedType
from comparator.backends.gptqmodel_layers import kernels, on_the_spot, shapes
from comparator.backends.gptqmodel_layers.backend import PackedLayers
from comparator.backends.gptqmodel_layers.kernels import Packed
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint

_BITS, _GROUPS = tuple(map(str, ready_made.BITS)), ("-1", "16", "32", "64", "128")
_OPTIONS = (
    Option("bits", "bits per weight", "4", choices=_BITS, form="{value}bit"),
    Option("group", "weights that share a scale and a zero point; -1: a whole row. Default: the largest of 128, 64 and 32 that divides every layer", None,
           choices=_GROUPS, form="g{value}"),
    Option("sym", "levels lie symmetrically around zero; sym=false has a zero point of its own for every group", "false",
           choices=("true", "false")),
    Option("cal", "calibration text: c4 or wikitext2 from the Hub, or the hash of a text of your own, which --calibration FILE stores. Default: the bundled text", None, kind="text"),
    Option("kernel", "what multiplies the packed weights. auto: the fastest that is ready, without compiling",
           "auto", choices=("auto", *KERNELS.names)),
    Option("dtype", "dtype of the activations and of what stays unquantized; on a GPU fp16", "fp16",
           choices=("fp16", "bf16")),
)  # fmt: skip


class Awq(PackedLayers):
    name = "awq"
    title = "AWQ"
    method_name = "awq"
    kernels = KERNELS
    decided = ("bits", "group", "sym")
    types = tuple(QuantizedType(f"int{bits} (AWQ)", int(bits)) for bits in _BITS)
    reads = ("awq",)
    calibration_option = "cal"
    makes_checkpoints = True
    random_config = random_layer.CONFIG
    methods = (
        Method("awq", "activation-aware rounding", "4 bits per weight; columns with large activations are scaled up before "
               "they are rounded. Quantized here (once, then cached), or ready-made: awq@user/repo.",
               _OPTIONS, takes_source=True, precision=39, bits=4, decode=("", "depends on the kernel")),
    )  # fmt: skip

    # ------------------------------------------------------------ options

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        calibration.check_name(values["cal"])
        if values["kernel"] != "auto" and int(values["bits"]) not in (able := KERNELS[values["kernel"]].bits):
            raise UserError(
                f"The kernel {values['kernel']} takes {' or '.join(map(str, able))} bits, not {values['bits']}.",
                "Leave kernel= out.",
            )

    def settings(self, checkpoint: Checkpoint, variant: Variant) -> dict[str, str | None]:
        if cal := self.values(variant)["cal"]:
            raise UserError(
                f"cal={cal} is requested, but {checkpoint.source} is quantized already.",
                "cal applies only when quantizing: remove it, or write awq without a source.",
            )
        ready = ready_made.read(checkpoint)
        return {"bits": str(ready.bits), "group": str(ready.group_size), "sym": str(ready.sym).lower()}

    def complete_on_the_spot(
        self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None
    ) -> Variant:
        if checkpoint.model_type == "gpt2":
            raise UserError(
                f"{checkpoint.architecture} keeps its weights transposed (Conv1D), and transformers packs linear layers "
                "only.",
                "Use nf4 or int8 for this model.",
            )
        shapes.require_full_precision(checkpoint, self.title, variant.method)
        wish = self.requested(variant).get("group")
        return self.with_options(
            variant, {"group": str(shapes.group_size(checkpoint, int(wish) if wish else None))}
        )

    def with_calibration(self, variant: Variant, source: Any) -> Variant:
        return variant if variant.source else calibration.applied_to(variant, source)

    def recipe(self, variant: Variant) -> Recipe:
        """Of a completed variant that is made on the spot."""
        values = self.values(variant)
        return Recipe(int(values["bits"]), int(values["group"]), values["sym"] == "true")

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
        cal = self.values(variant)["cal"]
        return on_the_spot.make(checkpoint, self.recipe(variant), cal, _cache_dir(), device, progress)

    def load(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> LoadedModel:
        from transformers import AwqConfig

        if os.environ.get("SPACES_ZERO_GPU"):  # there transformers' background loading meets no GPU
            os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
        dtype, notes = self.values(variant)["dtype"], []
        if dtype != "fp16" and placement.device.startswith("cuda"):
            raise UserError("transformers loads AWQ in fp16 on a GPU.", "Leave dtype= out.")
        kernel = self.kernel(variant, self.packed(variant, checkpoint), placement)
        arguments: dict[str, Any] = {}
        if variant.source:
            opened = self.opened(variant)
            notes = sources.tokenizer_note(opened, checkpoint) + sources.left_over_note(opened)
            arguments = _config_argument(ready_made.read(opened))
        else:
            path = self.make(checkpoint, variant, placement.device, progress)
            opened = replace(checkpoint, path=path, lent=None)
        with warnings.catch_warnings():
            # That the checkpoint's own config wins over the one passed here, which has the kernel only.
            warnings.simplefilter("ignore")
            model = transformers_loader.from_pretrained(
                opened,
                placement,
                progress,
                dtype=dtype,
                quantization_config=AwqConfig(backend=kernel.backend),
                **arguments,
            )
        loaded = self.loaded(model, variant, notes)
        if KERNELS.ran(loaded.kernel) != kernel:
            raise UserError(
                f"{loaded.kernel} multiplies {variant.notation} here, not the kernel {kernel.name}.",
                "This CPU may lack an instruction set that it needs: use another one, such as kernel=torch.",
            )
        return loaded

    def packed(self, variant: Variant, checkpoint: Checkpoint) -> Packed:
        dtype = self.values(variant)["dtype"]
        if variant.source:
            return ready_made.read(self.opened(variant)).packed(dtype)
        recipe = self.recipe(self.complete(variant, checkpoint))
        sizes = frozenset((layer.inputs, layer.outputs) for layer in shapes.layers(checkpoint))
        return Packed(recipe.bits, recipe.group_size, False, recipe.sym, dtype, sizes)

    # ------------------------------------------------------------ what is stored

    def dequantize(self, module: Any) -> Any | None:
        if not self.is_quantized(module):
            return None
        from comparator.backends.awq import unpack

        return unpack.weight(module)

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        values = self.values(variant)
        ran = self.kernel_that_ran(variant, kernel)
        imports = ["from transformers import AwqConfig"]
        setup = [f"quantization = AwqConfig(backend={ran.backend if ran else 'auto'!r})"]
        arguments = [f"dtype={dtypes.torch_name(values['dtype'])}", "quantization_config=quantization"]
        opened = self._opened.get((variant.source, variant.revision))
        if opened is not None and not (ready := ready_made.read(opened)).as_stored:
            imports = ["from transformers import AutoConfig, AwqConfig"]
            setup += [
                f"config = AutoConfig.from_pretrained({self.code_weights(variant)})",
                f"config.quantization_config = {ready.config!r}  # transformers does not know this checkpoint's names",
            ]
            arguments.append("config=config")
        return imports, setup, arguments

    def code_weights(self, variant: Variant) -> str | None:
        return repr(variant.source or on_the_spot.folder_name(variant))

    def code_comment(self, variant: Variant, model: str) -> list[str]:
        return [] if variant.source else on_the_spot.code_comment(variant, model, self.title)


def _config_argument(ready: ready_made.ReadyMade) -> dict[str, Any]:
    """The argument `config` where config.json has names that transformers does not read."""
    if ready.as_stored:
        return {}
    return {"config": sources.with_quantization(ready.checkpoint, ready.config)}


def _cache_dir() -> Path:
    from comparator.core.settings import get_settings

    return get_settings().cache_dir
