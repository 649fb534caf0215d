"""int8 weights times activations rounded to 8 bits, for one row, without waiting for the GPU.

torchao prints its input to see whether it is a compiler's (`"FakeTensor" in input.__repr__()`), which copies it to the host,
once a layer: no CUDA graph can hold that. And cuBLAS multiplies 8-bit integers from 17 rows on: for one row torchao unpacks
the weight to float32. Here the row is rounded by torchao, padded to 32 rows, and multiplied with torch's own 8-bit product:
the same integers, scaled in the same order.
"""

from __future__ import annotations

from typing import Any

from comparator.util.compat import torch as compat

NOTE = (
    "Decoded with torch's 8-bit product on the row padded to 32, instead of torchao's own, which waits for the GPU; the "
    "same rounded values, multiplied as integers."
)
_ROWS = 32  # CUDA's product takes more than 16


def rounds_activations(weight: Any) -> bool:
    return type(weight).__name__ == "Int8Tensor" and weight.act_quant_kwargs is not None


def refusal(weight: Any) -> str | None:
    """Why such a weight cannot be multiplied here, as a clause; None where it can."""
    kwargs = weight.act_quant_kwargs
    plain = all(
        getattr(weight, name) is None for name in ("act_pre_scale", "act_quant_scale", "act_quant_zero_point")
    )
    if kwargs.mapping_type.name != "SYMMETRIC" or not plain:
        return "torchao's product of asymmetric or pre-scaled activations waits for the GPU"
    if any(size % 8 for size in weight.shape):
        return "torch's 8-bit product needs sizes that are multiples of 8"
    return None


def one_row(x: Any, weight: Any, bias: Any = None) -> Any:
    """`x` (…, inputs) with one row in all → (…, outputs) in x's dtype. weight: torchao's Int8Tensor."""
    import torch

    kwargs = weight.act_quant_kwargs
    rounded = type(weight).from_hp(
        x.reshape(1, -1),
        kwargs.granularity,
        mapping_type=kwargs.mapping_type,
        reduce_range=kwargs.reduce_range,
    )
    rows = torch.nn.functional.pad(rounded.qdata, (0, 0, 0, _ROWS - 1))
    product = compat.int8_matmul(rows, weight.qdata.t())[:1]
    out = (product * rounded.scale.reshape(1, 1)).to(x.dtype) * weight.scale.flatten()
    out = out.to(x.dtype) if bias is None else (out + bias).to(x.dtype)
    return out.view(*x.shape[:-1], -1)
