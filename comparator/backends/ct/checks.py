"""What a compressed-tensors checkpoint holds, by its config and headers, and what is not read of it. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from comparator.backends.unpacked import dtype_of
from comparator.core.errors import UserError
from comparator.sources import Checkpoint, TensorInfo

_FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
            "mxfp4-pack-quantized")  # fmt: skip
INT4_GROUPS = (32, 64, 128, 256)
_OTHER = "Use a checkpoint that llm-compressor saved with quantized linear layers only."
_AGAIN = "It is damaged or cut off: download the checkpoint again."


def check(checkpoint: Checkpoint) -> None:
    """Raises `UserError` for what would not load, or load as something else."""
    source, config = checkpoint.source, checkpoint.quantization or {}
    for key, what in (
        ("sparsity_config", "sparse weights"),
        ("transform_config", "rotated weights"),
        ("kv_cache_scheme", "a quantized KV cache"),
    ):
        part = config.get(key)
        nothing = isinstance(part, dict) and (
            part.get("format") == "dense" or part.get("config_groups") == {}
        )
        if part and not nothing:
            raise UserError(f"{source} has {what} ({key}), which is not read here.", _OTHER)
    if (status := config.get("quantization_status", "compressed")) != "compressed":
        raise UserError(f"The weights of {source} are not compressed (quantization_status {status}).", _OTHER)
    for group in groups(checkpoint).values():
        if (how := group.get("format") or config.get("format")) not in _FORMATS:
            raise UserError(
                f"{source} is in the format {how!r}, which is not read here.",
                f"These are read: {', '.join(_FORMATS)}.",
            )
    _check_tensors(checkpoint)
    _check_experts(checkpoint)


def groups(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """config_groups of config.json. Raises `UserError` where it is not what llm-compressor writes."""
    config_groups = (checkpoint.quantization or {}).get("config_groups")
    whole = isinstance(config_groups, dict) and all(
        isinstance(g, dict) and isinstance(g.get("weights"), dict) and isinstance(g.get("targets"), list)
        for g in config_groups.values()
    )
    if not config_groups or not whole:
        raise UserError(
            f"config.json of {checkpoint.source} does not say how its weights are quantized (config_groups).",
            _OTHER,
        )
    return config_groups


def words(group: dict[str, Any]) -> str:
    """W4A16, W8A8, FP8, NVFP4 …, as vLLM's documentation names them."""
    weights, inputs = group["weights"], group.get("input_activations") or {}
    bits, rounded = weights.get("num_bits", 8), inputs.get("num_bits", 16)
    if weights.get("type", "int") != "float":
        return f"W{bits}A{rounded}"
    kind = {16: "NVFP", 32: "MXFP"}.get(weights.get("group_size"), "FP")
    return f"{kind}{bits}" + (f" with {kind}{rounded} activations" if rounded < 16 else "")


def is_plain(checkpoint: Checkpoint) -> bool:
    """Whether transformers can unpack all weights while loading, which it does by one group's settings."""
    return not rounds_activations(checkpoint) and len(groups(checkpoint)) == 1


def rounds_activations(checkpoint: Checkpoint) -> bool:
    return any(g.get("input_activations") or g.get("output_activations") for g in groups(checkpoint).values())


def _group(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """The group of a quantized tensor: the one whose targets name its module, else the one for all layers of a class."""
    every, module = list(groups(checkpoint).values()), name.rpartition(".")[0]
    named = [g for g in every if any(_matches(t, module) for t in g["targets"])]
    rest = [g for g in every if not all(str(t).startswith("re:") for t in g["targets"])]
    return [*named, *rest, *every][0]


def bits(checkpoint: Checkpoint, name: str) -> int:
    return int(_group(checkpoint, name)["weights"].get("num_bits", 8))


def _matches(target: Any, module: str) -> bool:
    text = str(target)
    return bool(re.match(text[3:], module)) if text.startswith("re:") else text == module


def is_state(name: str) -> bool:
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
            raise UserError(f"{tensor.name} of {source} has no matching weight_scale.", _AGAIN)
        if tensor.dtype == "int32" and f"{stem}.weight_shape" not in stored:
            raise UserError(f"{tensor.name} of {source} has no matching weight_shape.", _AGAIN)
    stems = {t.name.rpartition(".")[0] for t in quantized}
    zeros = [n for n in stored if n.endswith(".weight_zero_point") and stored[n].dtype == "int32"]
    if zeros and not is_plain(checkpoint):
        raise UserError(
            f"{source} has packed zero points ({zeros[0]}) beside rounded activations or several groups, which "
            "compressed-tensors does not load.",
            _OTHER,
        )
    if alone := [n for n in stored if n.endswith(".weight_scale") and n.rpartition(".")[0] not in stems]:
        raise UserError(f"{alone[0]} of {source} scales a weight that is not quantized.", _AGAIN)


def experts(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The quantized weights of experts."""
    found = (t for t in checkpoint.tensors if re.search(r"\.experts\.\d+\.", t.name))
    return [t for t in found if t.name.endswith(".weight_packed") or _is_code(t)]


def _check_experts(checkpoint: Checkpoint) -> None:
    """transformers merges the experts of a layer, and unpacks two kinds for that: symmetric packed integers, and FP8 with
    one scale per row or tensor. NVFP4 it would unpack without the scale of the tensor."""
    for tensor in experts(checkpoint):
        group = _group(checkpoint, tensor.name)
        weights = group["weights"]
        fp8 = tensor.dtype.startswith("fp8") and weights.get("strategy") in ("channel", "tensor")
        if not fp8 and not (tensor.dtype == "int32" and weights.get("symmetric", True)):
            kind = f"{words(group)}, {'' if weights.get('symmetric', True) else 'a'}symmetric, per {weights.get('strategy')}"
            raise UserError(
                f"{tensor.name} of {checkpoint.source} is an expert in {kind}: transformers keeps the experts of a layer as one "
                "parameter, and does not unpack this for it.",
                "Use a checkpoint whose experts are W4A16 with symmetric levels, or FP8 with a scale per row.",
            )


def _is_code(tensor: TensorInfo) -> bool:
    return tensor.name.endswith(".weight") and tensor.dtype.startswith(("int8", "uint8", "fp8"))


# ------------------------------------------------------------ what stays packed


@dataclass(frozen=True)
class Int4:
    """A linear layer of 4-bit integers: outputs × inputs weights, `group` of them along a row with one scale, and a zero point
    where they are not symmetric."""

    outputs: int
    inputs: int
    group: int
    zeros: bool

    @property
    def state_bytes(self) -> int:
        """torch's 4-bit matmul has a scale and an offset in bf16 per group."""
        return 4 * self.outputs * (self.inputs // self.group)


def int4_layers(checkpoint: Checkpoint) -> dict[str, Int4]:
    """By module's name, the packed layers as their headers describe them."""
    stored = {t.name: t for t in checkpoint.tensors}
    layers = {}
    for name, tensor in stored.items():
        module, _, part = name.rpartition(".")
        if part != "weight_packed":
            continue
        outputs, inputs = tensor.shape[0], 8 * tensor.shape[1]
        scales = stored[f"{module}.weight_scale"].shape[-1]
        layers[module] = Int4(
            outputs, inputs, inputs // max(scales, 1), f"{module}.weight_zero_point" in stored
        )
    return layers


def why_unpacked(checkpoint: Checkpoint) -> str | None:
    """Why torch's 4-bit matmul does not take every packed layer, as a clause. None where it does."""
    if rounds_activations(checkpoint):
        return "their activations are rounded by compressed-tensors, which multiplies unpacked weights"
    if experts(checkpoint):
        return "transformers keeps the experts of a layer as one parameter"
    weights = [group["weights"] for group in groups(checkpoint).values()]
    if any(w.get("type", "int") != "int" or w.get("num_bits") != 4 for w in weights):
        return f"they are {' + '.join(dict.fromkeys(words(g) for g in groups(checkpoint).values()))}, not integers of 4 bits alone"
    if dtype_of(checkpoint) != "bf16":
        return f"the model is in {dtype_of(checkpoint)}, and torch's 4-bit matmul in bf16"
    for name, layer in int4_layers(checkpoint).items():
        if (
            layer.group not in INT4_GROUPS
            or layer.inputs % layer.group
            or layer.outputs % 16
            or layer.inputs % 32
        ):
            return (
                f"{name} is {layer.outputs}×{layer.inputs} in groups of {layer.group}, and torch's 4-bit matmul takes groups of "
                f"{', '.join(map(str, INT4_GROUPS))} and rows by 16"
            )
    return None
