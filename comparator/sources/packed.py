"""How quantized checkpoints store their weights: names and shapes, by the `quant_method` of config.json. Headers only.

A backend that reads a format which is not here needs one entry in `PACKINGS`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from comparator.sources.checkpoint import TensorInfo

Quantization = dict[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Packing:
    """How one format stores a quantized weight.

    packed: found in the name of a tensor in place of the weight, or beside it: by it the files show that they are packed.
    state: found in the name of what lies beside a packed weight (scales, zero points, codebooks).
    ends: how the name of the packed tensor ends, and how the model's parameter ends instead. "" where both are the same.
    shape: (packed tensor, quantization_config) → the parameter's shape; None where the header does not tell.
    """

    packed: str
    state: str
    ends: tuple[str, str] = ("", "")
    shape: Callable[[TensorInfo, Quantization], Shape | None] = lambda tensor, quantization: tensor.shape


def bits_of(quantization: Quantization | None) -> int | None:
    """Bits of a quantized weight, where config.json says so in one of the usual places."""
    config = quantization or {}
    groups = config.get("config_groups")
    first = next(iter(groups.values()), None) if isinstance(groups, dict) else None
    weights = first.get("weights") if isinstance(first, dict) else None
    for part, key in ((config, "bits"), (config, "w_bit"), (config, "wbits"), (weights or {}, "num_bits")):
        value = part.get(key) if isinstance(part, dict) else None
        if isinstance(value, int) and 1 <= value <= 16:
            return value
    return None


def _rows_packed(tensor: TensorInfo, quantization: Quantization) -> Shape | None:
    """GPTQ: (inputs × bits ÷ 32, outputs) int32."""
    bits = bits_of(quantization)
    if len(tensor.shape) != 2 or bits not in (2, 3, 4, 8):
        return None
    return (tensor.shape[1], tensor.shape[0] * 32 // bits)


def _columns_packed(tensor: TensorInfo, quantization: Quantization) -> Shape | None:
    """AWQ: (inputs, outputs × bits ÷ 32) int32; its GEMV versions are laid out otherwise."""
    bits = bits_of(quantization)
    version = str(quantization.get("version") or "gemm").lower()
    if len(tensor.shape) != 2 or bits not in (2, 4, 8) or version != "gemm":
        return None
    return (tensor.shape[1] * 32 // bits, tensor.shape[0])


def _auto_round(tensor: TensorInfo, quantization: Quantization) -> Shape | None:
    awq = "awq" in str(quantization.get("packing_format") or "").lower()
    return (_columns_packed if awq else _rows_packed)(tensor, quantization)


def _compressed(tensor: TensorInfo, quantization: Quantization) -> Shape | None:
    """compressed-tensors: (outputs, inputs × bits ÷ 32) int32, or two 4-bit floats in each uint8."""
    if not tensor.name.endswith("weight_packed"):
        return tensor.shape
    if tensor.dtype == "uint8":
        return (*tensor.shape[:-1], 2 * tensor.shape[-1])
    return None  # the last word of a row may be padded: `weight_shape` says what it holds


def _wrapped(tensor: TensorInfo, quantization: Quantization) -> Shape | None:
    """torchao: a value an element in 8 bits. 4-bit layouts pack or pad, and only the files' metadata says how."""
    return None if tensor.dtype.startswith(("uint8", "int32")) else tensor.shape


def _unknown(tensor: TensorInfo, quantization: Quantization) -> Shape | None:
    return None


_QWEIGHT_STATE = r"\.(?:qzeros|scales|g_idx|perm)$"
PACKINGS: dict[str, Packing] = {
    "gptq": Packing(r"\.qweight$", _QWEIGHT_STATE, (".qweight", ".weight"), _rows_packed),
    "awq": Packing(r"\.qweight$", _QWEIGHT_STATE, (".qweight", ".weight"), _columns_packed),
    "auto-round": Packing(r"\.qweight$", _QWEIGHT_STATE, (".qweight", ".weight"), _auto_round),
    "bitsandbytes": Packing(
        r"\.weight\.quant_state\.bitsandbytes__|\.SCB$",
        r"\.(?:SCB|weight_format|weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\.\w+))$",
        shape=lambda tensor, _: None if tensor.dtype == "uint8" else tensor.shape,
    ),
    "fp8": Packing(r"_scale_inv$|\.weight_scale$", r"_scale_inv$|\.(?:weight_scale|input_scale|activation_scale)$"),
    "fbgemm_fp8": Packing(r"\.weight_scale$", r"\.(?:weight_scale|input_scale|input_scale_ub)$"),
    "mxfp4": Packing(r"_blocks$", r"_scales$", ("_blocks", ""), _unknown),
    "compressed-tensors": Packing(
        r"\.(?:weight_packed|weight_scale)$",
        r"\.(?:weight|input|output|k|v)_(?:scale|scale_2|zero_point|shape|g_idx|global_scale)$",
        (".weight_packed", ".weight"),
        _compressed,
    ),
    "torchao": Packing(
        r"\._weight_qdata$",
        r"\._weight_(?:scale|zero_point|scale_and_zero|per_tensor_scale|act_pre_scale|act_quant_scale|"
        r"act_quant_zero_point)$",
        ("._weight_qdata", ".weight"),
        _wrapped,
    ),
    "hqq": Packing(r"\.W_q$", r"\.(?:scale|zero|axis|channel_wise|group_size|nbits|offload_meta|optimize|packing|"
                   r"quant_scale|quant_zero|round_zero|shape|stores_quant_config|unpack_view_dtype|view_as_float|"
                   r"compute_dtype|encoded_state_dict)$", (".W_q", ".weight"), _unknown),
}  # fmt: skip
PACKINGS["intel/auto-round"] = PACKINGS["auto-round"]

# What a file may hold whatever its config says. HQQ's short names are those of ordinary parameters too.
_ANY_STATE = re.compile("|".join({p.state for method, p in PACKINGS.items() if method != "hqq"}))
_ANY_PACKED = re.compile("|".join({p.packed for p in PACKINGS.values()}))
_ENDS = tuple({p.ends[0] for p in PACKINGS.values()} - {""})


def method_of(quantization: Quantization) -> str:
    """The format's name. Old checkpoints of GPTQ and bitsandbytes do not write it."""
    old = "bitsandbytes" if quantization.get("load_in_8bit") or quantization.get("load_in_4bit") else "gptq"
    return str(quantization.get("quant_method") or old).lower()


def packing(quantization: Quantization | None) -> Packing | None:
    """None for a full-precision checkpoint, and for a method that is not in the table."""
    if quantization is None:
        return None
    return PACKINGS.get(method_of(quantization))


def looks_packed(name: str) -> bool:
    """Whether only a quantized checkpoint has a tensor of this name."""
    return bool(_ANY_PACKED.search(name))


def is_packed_weight(name: str) -> bool:
    """Whether a tensor of this name stands in place of a weight."""
    return name.endswith(_ENDS)


def is_state(name: str, quantization: Quantization | None = None) -> bool:
    """Whether a tensor lies beside a packed weight: scales, zero points, codebooks."""
    own = packing(quantization)
    return bool(_ANY_STATE.search(name)) or bool(own and re.search(own.state, name))


def parameter(tensor: TensorInfo, quantization: Quantization) -> tuple[str, Shape]:
    """(name, shape) of the model's parameter that a packed tensor holds; the stored shape where nothing tells more."""
    own = packing(quantization)
    if own is None:
        return tensor.name, tensor.shape
    stored, plain = own.ends
    if stored and tensor.name.endswith(stored):
        return tensor.name.removesuffix(stored) + plain, own.shape(tensor, quantization) or tensor.shape
    return tensor.name, tensor.shape


def values_per_element(
    tensor: TensorInfo, names: Collection[str], quantization: Quantization | None
) -> float:
    """Logical values in one stored element."""
    if tensor.name.endswith((".qweight", ".weight_packed")):
        return 8 * tensor.bytes / max(1, tensor.parameters) / (bits_of(quantization) or 4)
    if _holds_four_bits(tensor, names):
        return 2 * tensor.bytes / max(1, tensor.parameters)  # two in a byte, whatever dtype the buffer has
    if tensor.dtype == "uint8" and tensor.name.endswith("_blocks"):  # MXFP4 keeps two values in a byte
        return 2
    if tensor.name.endswith("._weight_qdata"):
        return {"int32": 8, "uint8": 2}.get(tensor.dtype, 1)
    if tensor.name.endswith(".W_q"):
        return 8 * tensor.bytes / max(1, tensor.parameters) / (bits_of(quantization) or 8)
    return 1


def count_of(tensor: TensorInfo, names: Collection[str]) -> int | None:
    """How many logical values a packed tensor holds whose shape is not the parameter's, where its header and the names of
    its neighbours tell; None elsewhere."""
    if _holds_four_bits(tensor, names):
        return 2 * tensor.bytes
    beside = tensor.name.removesuffix(".weight") + ".SCB"
    return tensor.parameters if tensor.dtype == "int8" and beside in names else None


def _holds_four_bits(tensor: TensorInfo, names: Collection[str]) -> bool:
    """Whether bitsandbytes packed it. The state beside it says so, since the buffer can have any dtype."""
    return any(f"{tensor.name}.quant_state.bitsandbytes__{m}" in names for m in ("nf4", "fp4"))
