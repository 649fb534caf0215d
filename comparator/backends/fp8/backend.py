"""FP8 checkpoints (`quant_method` fp8): 8-bit floats with one scale per block in `weight_scale_inv`, or one per tensor.

On a GPU that reads FP8 the weights stay packed. Elsewhere they are unpacked as they load.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from comparator.backends import dtypes, row_matmul
from comparator.backends.base import (
    AdapterKind,
    LoadedModel,
    Logical,
    Method,
    Option,
    Placement,
    Progress,
    QuantizedType,
)
from comparator.backends.fp8 import checks, random_layer
from comparator.backends.ready_made import FromCheckpoint, left_over_note, tokenizer_note, with_quantization
from comparator.backends.transformers_loader import refuse_main_memory
from comparator.backends.unpacked import Unpacked, dtype_of
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint

_OPTIONS = (
    Option("kernel", "packed: weights stay FP8 and are unpacked before each matmul, but for decode steps in a CUDA graph, which read "
           "them as they are; unpack: all are unpacked as they load; auto: packed on a GPU that reads FP8 (compute capability 8.9)",
           "auto", choices=("auto", "packed", "unpack")),
)  # fmt: skip
_NOTE = "FP8 kernels round activations to 8 bits as well; here they stay in 16 bits."


class BlockFP8(Unpacked):
    name = "fp8"
    requires = ("torch", "transformers")
    libraries = ("comparator.backends.fp8",)
    reads = ("fp8",)
    config_class = "FineGrainedFP8Config"
    random_config = random_layer.CONFIG
    types = (QuantizedType("fp8", 8, "8-bit floats, one scale per block"),)
    methods = (
        Method("fp8", "FP8 checkpoint", "8-bit floats with one scale per block of 128×128 weights: fp8@user/repo. Stays packed on a "
               "GPU that reads FP8; elsewhere unpacked as it loads, with the memory and speed of bf16.", _OPTIONS,
               takes_source=True, precision=46, bits=8, needs_source=True, decode=("similar", "faster")),
    )  # fmt: skip

    def stored_as(self, checkpoint: Checkpoint) -> str:
        return "FP8"

    def more_notes(self, checkpoint: Checkpoint) -> list[str]:
        return [_NOTE]

    def check_source(self, checkpoint: Checkpoint) -> None:
        checks.check(checkpoint)

    def complete(self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None) -> Variant:
        completed = super().complete(variant, checkpoint, progress)
        if self.values(completed)["kernel"] == "packed" and (
            why := checks.why_unpacked(self.opened(completed))
        ):
            raise UserError(
                f"The weights of {variant.source} cannot stay packed: {why}.", "Leave kernel= out."
            )
        return completed

    # ------------------------------------------------------------ loading

    def _stays_packed(self, variant: Variant, device: str) -> bool:
        kernel = self.values(variant)["kernel"]
        if kernel == "auto":
            return dtypes.reads_fp8(device) and not checks.why_unpacked(self.opened(variant))
        return kernel == "packed"

    def tensor_sizes(self, variant: Variant, checkpoint: Checkpoint, device: str = ""):
        if self._stays_packed(variant, device or "cuda"):
            return FromCheckpoint.tensor_sizes(self, variant, checkpoint, device)
        return super().tensor_sizes(variant, checkpoint, device)

    def load(self, checkpoint, variant: Variant, placement: Placement, progress: Progress) -> LoadedModel:
        if not self._stays_packed(variant, placement.device):
            return super().load(checkpoint, variant, placement, progress)
        refuse_main_memory(placement, "FP8")
        opened = self.opened(variant)
        dtype = dtype_of(opened)
        model = self.load_opened(
            variant,
            placement,
            progress,
            dtype=dtype,
            config=with_quantization(opened, _packed_layers(opened, dtype).to_dict()),
        )
        model.hf_quantizer.remove_quantization_config(model)
        notes = [_NOTE, *tokenizer_note(opened, checkpoint), *left_over_note(opened)]
        return LoadedModel(model, f"torch Linear, FP8 unpacked to {dtype} before each matmul", notes)

    def random_layer(self, outputs: int, inputs: int, std: float, generator: Any) -> dict[str, Any]:
        return random_layer.tensors(outputs, inputs, std, generator)

    # ------------------------------------------------------------ what is stored, where it stays packed

    def quant_state(self, module: Any) -> dict[str, Any]:
        return {"scale": module.weight_scale_inv} if self.owns(module) else {}

    def logical(self, module: Any, parameter: Any) -> Logical | None:
        if not self.owns(module) or parameter is not module.weight:
            return None
        return Logical("fp8", tuple(parameter.shape), dtypes.short_name(module.compute_dtype))

    def dequantize(self, module: Any) -> Any | None:
        import torch

        return module.dequantize(torch.float32) if self.owns(module) else None

    # ------------------------------------------------------------ decoding

    def on_parallel_streams(self, module: Any) -> bool:
        return row_matmul.runs_on(module.codes())

    def capture_forward(self, module: Any, rows: int = 1):
        if rows != 1 or not row_matmul.runs_on(codes := module.codes()):
            return None
        return lambda x: row_matmul.one_row(x, codes, module.bias)

    def capture_note(self, module: Any) -> str:
        return row_matmul.NOTE

    # ------------------------------------------------------------ adapters and training

    def check_adapter(self, variant: Variant, adapter: AdapterKind) -> None:
        plain = adapter.peft_type == "LORA" and not adapter.merged and not adapter.dora
        if self._stays_packed(variant, "cuda") and not plain:
            raise UserError(
                f"{adapter.source} is {adapter.kind}{', merged' if adapter.merged else ''}, and weights that stay in FP8 take an "
                "unmerged LoRA only.",
                f"Write {variant.notation}{',' if variant.options else ':'}kernel=unpack.",
            )

    def training_variants(self, variant: Variant, device: str) -> list[tuple[Variant, tuple[str, ...]]]:
        return [(self.with_options(variant, {"kernel": "unpack"}), ("Trained with kernel=unpack.",))]


def _packed_layers(checkpoint: Checkpoint, dtype: str) -> Any:
    from comparator.backends.fp8.layer import FP8Linear
    from comparator.backends.stored_layers.quantizer import StoredLayers

    stored = {t.name: t for t in checkpoint.tensors}
    layers = {}
    for weight in checks.weights(checkpoint):
        scale = stored[f"{weight.name}_scale_inv"]
        module = weight.name.removesuffix(".weight")
        activation = stored.get(f"{module}.activation_scale")
        layers[module] = partial(
            FP8Linear,
            compute_dtype=dtypes.torch_dtype(dtype),
            scale_dtype=dtypes.torch_dtype("float8_e8m0fnu" if scale.dtype == "fp8_e8m0" else scale.dtype),
            scales=scale.shape,
            activation_scale=activation.shape if activation else None,
        )
    return StoredLayers("FP8", layers)
