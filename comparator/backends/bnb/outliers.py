"""LLM.int8() with its outlier threshold, for one row, without waiting for the device.

bitsandbytes asks the GPU which input features hold an outlier and waits for the answer (`outliers.any()`), once a
layer: no CUDA graph can hold that. For a single row the question can stay on the device:

    x₀      = x with the outliers set to 0                      (bitsandbytes' kernel leaves them out likewise)
    y       = dequantize(quantize(x₀) · Wq)                     (bitsandbytes' own operations)
    y      += Σ over outliers j of x[j] · dequantize(Wq[:, j])  (here, one kernel that counts for itself)

Same outliers, same quantized values, same 16-bit values in the last sum; only the order of that float32 sum may
differ. Used for decoding in a CUDA graph; prefill and eager decoding stay bitsandbytes' own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

NOTE = (
    "Decoded with the outliers of LLM.int8 picked on the GPU, one kernel in place of bitsandbytes' question to the "
    "host; the same outliers and the same values, summed in another order."
)


def one_row(x: Any, state: Any, bias: Any = None) -> Any:
    """`x` (…, features) with one row in all → (…, outputs) in x's dtype. `state`: bitsandbytes' MatmulLtState."""
    import torch

    row = x.reshape(-1, x.shape[-1])
    if row.shape[0] != 1:
        raise ValueError(f"one row at a time, not {row.shape[0]}")
    half = row.to(torch.float16)
    cuda = x.device.type == "cuda"
    inner = (
        _without_outliers_kernel(half, state.threshold)
        if cuda
        else half.masked_fill(half.abs() >= state.threshold, 0)
    )
    quantized, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(inner, threshold=0.0)
    if bias is not None:
        bias = bias.to(x.dtype)
    out = torch.ops.bitsandbytes.int8_scaled_mm.default(
        quantized, state.CB, scale, state.SCB, bias=bias, dtype=x.dtype
    )
    add = _add_outliers_kernel if cuda else add_outliers
    return add(out, row, half, state.CB, state.SCB, state.threshold).view(*x.shape[:-1], -1)


def add_outliers(out: Any, row: Any, half: Any, weight: Any, scales: Any, threshold: float) -> Any:
    """The last line of the formula in plain torch: what the kernel is tested against."""
    import torch

    columns = torch.nonzero(half[0].abs() >= threshold).view(-1)
    if not columns.numel():
        return out
    values = torch.ops.bitsandbytes.int8_vectorwise_dequant.default(weight[:, columns].contiguous(), scales)
    return out.addmm(row[:, columns].contiguous(), values.to(row.dtype).t())


def _without_outliers_kernel(half: Any, threshold: float) -> Any:
    import torch

    out = torch.empty_like(half)
    size = half.shape[-1]
    _kernels()[0][(-(-size // 1024),)](half, out, size, threshold, BLOCK=1024, num_warps=4)
    return out


def _add_outliers_kernel(out: Any, row: Any, half: Any, weight: Any, scales: Any, threshold: float) -> Any:
    size, outputs = row.shape[-1], weight.shape[0]
    block = 1 << (size - 1).bit_length()
    _kernels()[1][(-(-outputs // 128),)](
        out, row, half, weight, scales, size, outputs, threshold,
        BLOCK=block, ROWS=128, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return out


@cache
def _kernels() -> tuple[Any, Any]:
    from comparator.backends.bnb import triton_outliers

    return triton_outliers.without_outliers, triton_outliers.add_outliers
