"""compressed-tensors checkpoints, which llm-compressor writes for vLLM: 4-bit integers in groups (W4A16), 8-bit integers and
floats with or without 8-bit activations (W8A8, FP8), and 4-bit floats (NVFP4, MXFP4).

Loading is transformers' own; the library unpacks each layer, and rounds activations where the checkpoint says so.
"""

from __future__ import annotations

import re
from typing import Any

from comparator.backends.base import Method, Placement, Progress
from comparator.backends.dtypes import torch_dtype
from comparator.backends.unpacked import Unpacked, dtype_of
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint, TensorInfo

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
            "mxfp4-pack-quantized")  # fmt: skip
_OWN = "compressed-tensors Linear"  # as its forward is the library's, which rounds activations
_OTHER = "Use a checkpoint that llm-compressor saved with quantized linear layers only."
_AGAIN = "It is damaged or cut off: download the checkpoint again."


class CompressedTensors(Unpacked):
    name = "ct"
    requires = ("torch", "transformers", "compressed_tensors")
    install = "-r requirements-formats.txt"
    reads = ("compressed-tensors",)
    config_class = "CompressedTensorsConfig"
    why = "transformers and compressed-tensors unpack it, since the kernels for it are vLLM's"
    methods = (
        Method("ct", "compressed-tensors", "4- or 8-bit integers or floats as llm-compressor saves them for vLLM: ct@user/repo. "
               "Unpacked as it loads, so memory is that of bf16; activations are rounded where the checkpoint says so.", takes_source=True, needs_source=True, precision=37, bits=4),
    )  # fmt: skip

    # ------------------------------------------------------------ the checkpoint

    def stored_as(self, checkpoint: Checkpoint) -> str:
        return " + ".join(dict.fromkeys(_words(group) for group in _groups(checkpoint).values()))

    def layer_name(self, checkpoint: Checkpoint) -> str:
        return "torch Linear" if _is_plain(checkpoint) else _OWN

    def more_notes(self, checkpoint: Checkpoint) -> list[str]:
        if not _rounds_activations(checkpoint):
            return []
        but = (
            ", except before experts, which transformers keeps as one parameter per layer"
            if _experts(checkpoint)
            else ""
        )
        return [
            f"Activations are rounded before each quantized layer, as compressed-tensors does it{but}: fidelity is that of the "
            "checkpoint, and the rounding costs time that vLLM's kernels save."
        ]

    def check_source(self, checkpoint: Checkpoint) -> None:
        source, config = checkpoint.source, checkpoint.quantization or {}
        for key, words in (
            ("sparsity_config", "sparse weights"),
            ("transform_config", "rotated weights"),
            ("kv_cache_scheme", "a quantized KV cache"),
        ):
            part = config.get(key)
            nothing = isinstance(part, dict) and (
                part.get("format") == "dense" or part.get("config_groups") == {}
            )
            if part and not nothing:
                raise UserError(f"{source} has {words} ({key}), which is not read here.", _OTHER)
        if (status := config.get("quantization_status", "compressed")) != "compressed":
            raise UserError(
                f"The weights of {source} are not compressed (quantization_status {status}).", _OTHER
            )
        for group in _groups(checkpoint).values():
            if (how := group.get("format") or config.get("format")) not in _FORMATS:
                raise UserError(
                    f"{source} is in the format {how!r}, which is not read here.",
                    f"These are read: {', '.join(_FORMATS)}.",
                )
        _check_tensors(checkpoint)
        _check_experts(checkpoint)

    def needed_bytes(self, variant: Variant, checkpoint: Checkpoint) -> int:
        opened = self.opened(variant)
        width = 4 if dtype_of(opened) == "fp32" else 2
        total = 0
        for tensor in opened.tensors:
            if not _is_state(tensor.name) and not opened.is_tied_head(tensor.name):
                packed = tensor.name.endswith(".weight_packed")
                total += 8 * tensor.bytes // _bits(opened, tensor.name) if packed else tensor.parameters
        return total * width

    # ------------------------------------------------------------ loading

    def silence(self) -> None:
        from loguru import logger

        logger.disable("compressed_tensors")

    def unpack(self, variant: Variant, placement: Placement, progress: Progress, dtype: str) -> Any:
        """transformers unpacks while loading where all weights are of one kind. Else as the library loads it, with every layer
        unpacked here in place of at the first forward pass."""
        from comparator.util.compat.compressed_tensors import without_bars

        if _is_plain(self.opened(variant)):
            return super().unpack(variant, placement, progress, dtype)
        if placement.max_memory:
            raise UserError(
                f"{variant.source} cannot be spread over devices: compressed-tensors unpacks its layers in place.",
                "Leave the memory limits out, or use gptq.",
            )
        with without_bars():
            model = self.load_opened(variant, placement, progress, dtype=dtype)
        quantizer = model.hf_quantizer
        quantizer.compressor.remove_decompression_hook(model)
        for module in model.modules():
            if self.owns(module):
                _unpack_layer(module, torch_dtype(dtype))
        quantizer.remove_quantization_config(model)
        return model.requires_grad_(False)

    # ------------------------------------------------------------ what rounds its activations

    def owns(self, module: Any) -> bool:
        return getattr(module, "quantization_scheme", None) is not None

    def opaque(self, module: Any) -> bool:
        """Its forward is compressed-tensors' own Python, which looks up schemes."""
        return True

    def graph_refusal(self, module: Any) -> str | None:
        """Scales of each token's activations are compared with a constant that lies in the CPU's memory."""
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

    def training_variants(self, variant: Variant, device: str) -> list[tuple[Variant, tuple[str, ...]]]:
        note = "The rounding of activations has no gradients: it is left out while training."
        return [(variant, (note,) if _rounds_activations(self.opened(variant)) else ())]

    def prepare_for_training(self, model: Any) -> None:
        for module in model.modules():
            if self.owns(module):
                module.quantization_enabled = False

    # ------------------------------------------------------------ code

    def code(self, variant: Variant, placement: Placement, *, layers: Any = (), kernel: str | None = None):
        imports, setup, arguments = super().code(variant, placement, layers=layers, kernel=kernel)
        return ([], [], arguments[:1]) if (kernel or "").startswith(_OWN) else (imports, setup, arguments)


def _groups(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """config_groups of config.json. Raises `UserError` where it is not what llm-compressor writes."""
    groups = (checkpoint.quantization or {}).get("config_groups")
    whole = isinstance(groups, dict) and all(
        isinstance(g, dict) and isinstance(g.get("weights"), dict) and isinstance(g.get("targets"), list)
        for g in groups.values()
    )
    if not groups or not whole:
        raise UserError(
            f"config.json of {checkpoint.source} does not say how its weights are quantized (config_groups).",
            _OTHER,
        )
    return groups


def _words(group: dict[str, Any]) -> str:
    """W4A16, W8A8, FP8, NVFP4 …, as vLLM's documentation names them."""
    weights, inputs = group["weights"], group.get("input_activations") or {}
    bits, rounded = weights.get("num_bits", 8), inputs.get("num_bits", 16)
    if weights.get("type", "int") != "float":
        return f"W{bits}A{rounded}"
    kind = {16: "NVFP", 32: "MXFP"}.get(weights.get("group_size"), "FP")
    return f"{kind}{bits}" + (f" with {kind}{rounded} activations" if rounded < 16 else "")


def _is_plain(checkpoint: Checkpoint) -> bool:
    """Whether transformers can unpack all weights while loading, which it does by one group's settings."""
    return not _rounds_activations(checkpoint) and len(_groups(checkpoint)) == 1


def _unpack_layer(module: Any, dtype: Any) -> None:
    """The weight of a packed layer in `dtype`, without its scales. What rounds activations stays on the module."""
    from compressed_tensors.compressors import decompress_module

    scheme = module.quantization_scheme
    rounds = scheme.input_activations is not None or scheme.output_activations is not None
    decompress_module(module, leave_decompressed=rounds)
    for name in [n for n, _ in module.named_parameters(recurse=False) if n.startswith("weight_")]:
        delattr(module, name)
    module.weight.data = module.weight.data.to(dtype)


def _rounds_activations(checkpoint: Checkpoint) -> bool:
    return any(
        g.get("input_activations") or g.get("output_activations") for g in _groups(checkpoint).values()
    )


def _group(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The group of a quantized tensor: the one whose targets name its module, else the one for all layers of a class."""
    groups, module = list(_groups(checkpoint).values()), name.rpartition(".")[0]
    named = [g for g in groups if any(_matches(t, module) for t in g["targets"])]
    rest = [g for g in groups if not all(str(t).startswith("re:") for t in g["targets"])]
    return [*named, *rest, *groups][0]


def _bits(checkpoint: Checkpoint, name: str) -> int:
    return int(_group(checkpoint, name)["weights"].get("num_bits", 8))


def _matches(target: Any, module: str) -> bool:
    text = str(target)
    return bool(re.match(text[3:], module)) if text.startswith("re:") else text == module


def _is_state(name: str) -> bool:
    end = name.rpartition(".")[2]
    return end.startswith(("weight_", "input_", "output_")) and end != "weight_packed"


def _check_tensors(checkpoint: Checkpoint) -> None:
    """Every quantized weight with what lies beside it, by names and shapes."""
    stored, source = {t.name: t for t in checkpoint.tensors}, checkpoint.source
    if ordered := [n for n in stored if n.endswith(".weight_g_idx")]:
        raise UserError(f"{ordered[0]} of {source}: its columns are in another order (actorder=group), which transformers "
                        "does not read.", _OTHER)  # fmt: skip
    quantized = [t for t in checkpoint.tensors if t.name.endswith(".weight_packed") or _is_code(t)]
    if not quantized:
        raise UserError(f"{source} says compressed-tensors, and none of its weights is quantized.", _OTHER)
    for tensor in quantized:
        stem = tensor.name.rpartition(".")[0]
        if f"{stem}.weight_scale" not in stored:
            raise UserError(f"{tensor.name} of {source} has no weight_scale beside it.", _AGAIN)
        if tensor.dtype == "int32" and f"{stem}.weight_shape" not in stored:
            raise UserError(f"{tensor.name} of {source} has no weight_shape beside it.", _AGAIN)
    stems = {t.name.rpartition(".")[0] for t in quantized}
    zeros = [n for n in stored if n.endswith(".weight_zero_point") and stored[n].dtype == "int32"]
    if zeros and not _is_plain(checkpoint):
        raise UserError(
            f"{source} has packed zero points ({zeros[0]}) beside rounded activations or several groups, which "
            "compressed-tensors does not load.",
            _OTHER,
        )
    if alone := [n for n in stored if n.endswith(".weight_scale") and n.rpartition(".")[0] not in stems]:
        raise UserError(f"{alone[0]} of {source} scales a weight that is not quantized.", _AGAIN)


def _experts(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The quantized weights of experts."""
    found = (t for t in checkpoint.tensors if re.search(r"\.experts\.\d+\.", t.name))
    return [t for t in found if t.name.endswith(".weight_packed") or _is_code(t)]


def _check_experts(checkpoint: Checkpoint) -> None:
    """transformers merges the experts of a layer, and unpacks two kinds for that: symmetric packed integers, and FP8 with
    one scale per row or tensor. NVFP4 it would unpack without the scale of the tensor."""
    for tensor in _experts(checkpoint):
        group = _group(checkpoint, tensor.name)
        weights = group["weights"]
        fp8 = tensor.dtype.startswith("fp8") and weights.get("strategy") in ("channel", "tensor")
        if not fp8 and not (tensor.dtype == "int32" and weights.get("symmetric", True)):
            kind = f"{_words(group)}, {'' if weights.get('symmetric', True) else 'a'}symmetric, per {weights.get('strategy')}"
            raise UserError(
                f"{tensor.name} of {checkpoint.source} is an expert in {kind}: transformers keeps the experts of a layer as one "
                "parameter, and does not unpack this for it.",
                "Use a checkpoint whose experts are W4A16 with symmetric levels, or FP8 with a scale per row.",
            )


def _is_code(tensor: TensorInfo) -> bool:
    return tensor.name.endswith(".weight") and tensor.dtype.startswith(("int8", "uint8", "fp8"))
