"""compressed-tensors checkpoints, which llm-compressor writes for vLLM: 4-bit integers in groups (W4A16), 8-bit integers and
floats with or without 8-bit activations (W8A8, FP8), and 4-bit floats (NVFP4, MXFP4).

W4A16 stays packed where torch's 4-bit matmul takes its layers. Everything else is loaded by transformers; the library unpacks each
layer, and rounds activations where the checkpoint says so.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from comparator.backends import dtypes
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
from comparator.backends.ct import checks
from comparator.backends.ready_made import left_over_note, tokenizer_note, with_quantization
from comparator.backends.sizes import FLOAT_BYTES, TensorSize, held, plain
from comparator.backends.transformers_loader import refuse_main_memory
from comparator.backends.unpacked import Unpacked, dtype_of
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint, TensorInfo

_OPTIONS = (
    Option("kernel", "int4pack: 4-bit integers stay packed and are multiplied by torch's 4-bit matmul; unpack: all weights are unpacked "
           "to bf16 as they load; auto: int4pack where every layer fits it", "auto", choices=("auto", "int4pack", "unpack")),
)  # fmt: skip
_OWN = "compressed-tensors Linear"  # as its forward is the library's, which rounds activations


class CompressedTensors(Unpacked):
    name = "ct"
    requires = ("torch", "transformers", "compressed_tensors")
    install = "-r requirements-formats.txt"
    reads = ("compressed-tensors",)
    config_class = "CompressedTensorsConfig"
    libraries = ("comparator.backends.ct",)
    types = (QuantizedType("int4 (ct)", 4),)
    why = "transformers and compressed-tensors unpack it, since the kernels for it are vLLM's"
    methods = (
        Method("ct", "compressed-tensors", "4- or 8-bit integers or floats as llm-compressor saves them for vLLM: ct@user/repo. "
               "W4A16 in bf16 stays packed; the rest is unpacked as it loads, with the memory of bf16. Activations are rounded "
               "where the checkpoint says so.", _OPTIONS, takes_source=True, needs_source=True, precision=37, bits=4),
    )  # fmt: skip

    # ------------------------------------------------------------ the checkpoint

    def stored_as(self, checkpoint: Checkpoint) -> str:
        return " + ".join(dict.fromkeys(checks.words(group) for group in checks.groups(checkpoint).values()))

    def layer_name(self, checkpoint: Checkpoint) -> str:
        return "torch Linear" if checks.is_plain(checkpoint) else _OWN

    def more_notes(self, checkpoint: Checkpoint) -> list[str]:
        if not checks.rounds_activations(checkpoint):
            return []
        but = (
            ", except before experts, which transformers keeps as one parameter per layer"
            if checks.experts(checkpoint)
            else ""
        )
        return [
            f"Activations are rounded before each quantized layer, as compressed-tensors does it{but}: fidelity is that of the "
            "checkpoint, and the rounding costs time that vLLM's kernels save."
        ]

    def check_source(self, checkpoint: Checkpoint) -> None:
        checks.check(checkpoint)

    def complete(self, variant: Variant, checkpoint: Checkpoint, progress: Progress | None = None) -> Variant:
        completed = super().complete(variant, checkpoint, progress)
        if self.values(completed)["kernel"] == "int4pack" and (
            why := checks.why_unpacked(self.opened(completed))
        ):
            raise UserError(
                f"The weights of {variant.source} cannot stay packed: {why}.", "Leave kernel= out."
            )
        return completed

    def _stays_packed(self, variant: Variant) -> bool:
        return self.values(variant)["kernel"] != "unpack" and not checks.why_unpacked(self.opened(variant))

    def tensor_sizes(self, variant: Variant, checkpoint: Checkpoint, device: str = ""):
        opened = self.opened(variant)
        width = FLOAT_BYTES[dtype_of(opened)]
        packed = checks.int4_layers(opened) if self._stays_packed(variant) else {}
        return [_size(opened, t, width, packed) for t in held(opened) if not checks.is_state(t.name)]

    # ------------------------------------------------------------ loading

    def silence(self) -> None:
        from loguru import logger

        logger.disable("compressed_tensors")

    def load(self, checkpoint, variant: Variant, placement: Placement, progress: Progress) -> LoadedModel:
        if not self._stays_packed(variant):
            return super().load(checkpoint, variant, placement, progress)
        refuse_main_memory(placement, "packed compressed-tensors")
        if not dtypes.supports_bf16(placement.device):
            raise UserError("This GPU has no bf16.", f"Use gptq, or a model in fp16 beside {variant.source}.")
        from comparator.backends.ct.layer import Int4Linear
        from comparator.backends.stored_layers.quantizer import StoredLayers

        opened = self.opened(variant)
        layers = {
            name: partial(Int4Linear, layout=layout) for name, layout in checks.int4_layers(opened).items()
        }
        config = with_quantization(opened, StoredLayers("4-bit integers", layers).to_dict())
        model = self.load_opened(variant, placement, progress, dtype="bf16", config=config)
        model.hf_quantizer.remove_quantization_config(model)
        notes = tokenizer_note(opened, checkpoint) + left_over_note(opened)
        return LoadedModel(model, "torch int4pack", notes)

    def unpack(self, variant: Variant, placement: Placement, progress: Progress, dtype: str) -> Any:
        """transformers unpacks while loading where all weights are of one kind. Else as the library loads it, with every layer
        unpacked here in place of at the first forward pass."""
        from comparator.util.compat.compressed_tensors import without_bars

        if checks.is_plain(self.opened(variant)):
            return super().unpack(variant, placement, progress, dtype)
        if placement.max_memory:
            raise UserError(
                f"{variant.source} cannot be spread over devices: compressed-tensors unpacks its layers in place.",
                "Remove the memory limits, or use gptq.",
            )
        with without_bars():
            model = self.load_opened(variant, placement, progress, dtype=dtype)
        quantizer = model.hf_quantizer
        quantizer.compressor.remove_decompression_hook(model)
        for module in model.modules():
            if _rounds(module):
                _unpack_layer(module, dtypes.torch_dtype(dtype))
        quantizer.remove_quantization_config(model)
        return model.requires_grad_(False)

    # ------------------------------------------------------------ what is stored, where it stays packed

    def quant_state(self, module: Any) -> dict[str, Any]:
        return {"scale and offset": module.scales_and_zeros} if _is_packed(module) else {}

    def logical(self, module: Any, parameter: Any) -> Logical | None:
        if not _is_packed(module) or parameter is not module.weight:
            return None
        return Logical("int4 (ct)", (module.out_features, module.in_features), "bf16")

    def dequantize(self, module: Any) -> Any | None:
        return module.dequantize().float() if _is_packed(module) else None

    # ------------------------------------------------------------ decoding

    def owns(self, module: Any) -> bool:
        return _is_packed(module) or _rounds(module)

    def on_parallel_streams(self, module: Any) -> bool:
        """torch's 4-bit matmul is one short kernel."""
        return _is_packed(module)

    def opaque(self, module: Any) -> bool:
        """A forward with rounded activations is compressed-tensors' own Python, which looks up schemes."""
        return _rounds(module)

    def graph_refusal(self, module: Any) -> str | None:
        """Scales of each token's activations are compared with a constant that lies in the CPU's memory."""
        if not _rounds(module):
            return None
        scheme = module.quantization_scheme
        dynamic = any(
            part is not None and part.dynamic
            for part in (scheme.input_activations, scheme.output_activations)
        )
        return (
            "compressed-tensors copies a number from the CPU each time it rounds activations"
            if dynamic
            else None
        )

    # ------------------------------------------------------------ adapters and training

    def check_adapter(self, variant: Variant, adapter: AdapterKind) -> None:
        plain = adapter.peft_type == "LORA" and not adapter.merged and not adapter.dora
        is_open = (
            variant.source,
            variant.revision,
        ) in self._opened  # asking the Hub is not this check's business
        if not plain and is_open and self._stays_packed(variant):
            raise UserError(
                f"{adapter.source} is {adapter.kind}{', merged' if adapter.merged else ''}, and packed weights take an unmerged LoRA "
                "only.",
                f"Write {variant.notation}{',' if variant.options else ':'}kernel=unpack.",
            )

    def training_variants(self, variant: Variant, device: str) -> list[tuple[Variant, tuple[str, ...]]]:
        if self._stays_packed(variant):
            note = "Trained with kernel=unpack: torch's 4-bit matmul has no gradients."
            return [(self.with_options(variant, {"kernel": "unpack"}), (note,))]
        note = "The rounding of activations has no gradients: it is left out while training."
        return [(variant, (note,) if checks.rounds_activations(self.opened(variant)) else ())]

    def prepare_for_training(self, model: Any) -> None:
        for module in model.modules():
            if _rounds(module):
                module.quantization_enabled = False

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        imports, setup, arguments = super().code(variant, placement, layers=layers, kernel=kernel)
        return ([], [], arguments[:1]) if (kernel or "").startswith(_OWN) else (imports, setup, arguments)


def _size(
    checkpoint: Checkpoint, tensor: TensorInfo, width: int, packed: dict[str, checks.Int4]
) -> TensorSize:
    """width: bytes of a value that is not packed. packed: the layers that stay so."""
    if not tensor.name.endswith(".weight_packed"):
        return plain(tensor, width)
    if layer := packed.get(tensor.name.removesuffix(".weight_packed")):
        return TensorSize(tensor.name, layer.outputs * layer.inputs // 2, layer.state_bytes)
    return TensorSize(tensor.name, width * (8 * tensor.bytes // checks.bits(checkpoint, tensor.name)))


def _is_packed(module: Any) -> bool:
    return type(module).__module__ == "comparator.backends.ct.layer"


def _rounds(module: Any) -> bool:
    """Whether the forward is compressed-tensors' own."""
    return getattr(module, "quantization_scheme", None) is not None


def _unpack_layer(module: Any, dtype: Any) -> None:
    """The weight of a packed layer in `dtype`, without its scales. What rounds activations stays on the module."""
    from compressed_tensors.compressors import decompress_module

    scheme = module.quantization_scheme
    rounds = scheme.input_activations is not None or scheme.output_activations is not None
    decompress_module(module, leave_decompressed=rounds)
    for name in [n for n, _ in module.named_parameters(recurse=False) if n.startswith("weight_")]:
        delattr(module, name)
    module.weight.data = module.weight.data.to(dtype)
