"""AWQ: 4 bits per weight, rounded after the columns were scaled by what the activations need. Ready-made checkpoints.

Loading itself is transformers' own (through gptqmodel).
"""

from __future__ import annotations

import os
import warnings
from typing import Any

from comparator.backends import dtypes
from comparator.backends import ready_made as sources
from comparator.backends.awq import ready_made
from comparator.backends.awq.kernels import KERNELS
from comparator.backends.base import LoadedModel, Method, Option, Placement, Progress, QuantizedType
from comparator.backends.gptqmodel_layers import kernels
from comparator.backends.gptqmodel_layers.backend import PackedLayers
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint

_BITS, _GROUPS = tuple(map(str, ready_made.BITS)), ("-1", "16", "32", "64", "128")
_OPTIONS = (
    Option("bits", "bits per weight", "4", choices=_BITS, form="{value}bit"),
    Option("group", "weights that share a scale and a zero point; -1: a whole row. It comes from the checkpoint", None,
           choices=_GROUPS, form="g{value}"),
    Option("sym", "levels lie symmetrically around zero; sym=false has a zero point of its own for every group", "false",
           choices=("true", "false")),
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
    requires = ("torch", "transformers", "gptqmodel")
    decided = ("bits", "group", "sym")
    types = tuple(QuantizedType(f"int{bits} (AWQ)", int(bits)) for bits in _BITS)
    reads = ("awq",)
    methods = (
        Method("awq", "activation-aware rounding", "4 bits per weight; columns with large activations are scaled up before "
               "they are rounded. Loads ready-made checkpoints: awq@user/repo.",
               _OPTIONS, takes_source=True, precision=39, bits=4, needs_source=True),
    )  # fmt: skip

    # ------------------------------------------------------------ options

    def check(self, variant: Variant, values: dict[str, str]) -> None:
        if values["kernel"] != "auto" and int(values["bits"]) not in (able := KERNELS[values["kernel"]].bits):
            raise UserError(
                f"The kernel {values['kernel']} takes {' or '.join(map(str, able))} bits, not {values['bits']}.",
                "Leave kernel= out.",
            )

    def settings(self, checkpoint: Checkpoint, variant: Variant) -> dict[str, str | None]:
        ready = ready_made.read(checkpoint)
        return {"bits": str(ready.bits), "group": str(ready.group_size), "sym": str(ready.sym).lower()}

    # ------------------------------------------------------------ loading

    def prepare(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> None:
        ready = ready_made.read(self.opened(variant))
        packed = ready.packed(self.values(variant)["dtype"])
        kernels.prepare(self.kernel(variant, packed, placement), packed, progress)

    def load(
        self, checkpoint: Checkpoint, variant: Variant, placement: Placement, progress: Progress
    ) -> LoadedModel:
        from transformers import AutoConfig, AwqConfig

        if os.environ.get("SPACES_ZERO_GPU"):  # there transformers' background loading meets no GPU
            os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
        opened, dtype = self.opened(variant), self.values(variant)["dtype"]
        ready = ready_made.read(opened)
        if dtype != "fp16" and placement.device.startswith("cuda"):
            raise UserError("transformers loads AWQ in fp16 on a GPU.", "Leave dtype= out.")
        kernel = self.kernel(variant, ready.packed(dtype), placement)
        arguments: dict[str, Any] = {}
        if not ready.as_stored:
            arguments["config"] = AutoConfig.from_pretrained(opened.path, local_files_only=True)
            arguments["config"].quantization_config = ready.config
        with warnings.catch_warnings():
            # That the checkpoint's own config wins over the one passed here, which has the kernel only.
            warnings.simplefilter("ignore")
            model = self.load_opened(
                variant,
                placement,
                progress,
                dtype=dtype,
                quantization_config=AwqConfig(backend=kernel.backend),
                **arguments,
            )
        notes = sources.tokenizer_note(opened, checkpoint) + sources.left_over_note(opened)
        loaded = self.loaded(model, variant, notes)
        if KERNELS.ran(loaded.kernel) != kernel:
            raise UserError(
                f"{loaded.kernel} multiplies {variant.notation} here, not the kernel {kernel.name}.",
                "This CPU may lack what it needs: name another one, kernel=torch.",
            )
        return loaded

    # ------------------------------------------------------------ what is stored

    def dequantize(self, module: Any) -> Any | None:
        if not self.is_quantized(module):
            return None
        from comparator.backends.awq import unpack

        return unpack.weight(module)

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        values = self.values(variant)
        ran = KERNELS.ran(kernel)
        if ran is None and values["kernel"] != "auto":
            ran = KERNELS[values["kernel"]]
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
