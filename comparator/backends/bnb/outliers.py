"""LLM.int8() with its outlier threshold, for the rows of a decode step, without waiting for the device.

bitsandbytes asks the GPU which input features hold an outlier in any row and waits for the answer (`outliers.any()`),
once a layer: no CUDA graph can hold that. For a few rows the question can stay on the device:

    x₀      = x with the outliers set to 0                      (bitsandbytes' kernel leaves them out likewise)
    q, s    = quantize(x₀), then q[:, j] = 0 for all j with an outlier in any row
    y       = dequantize(q · Wq)                                (bitsandbytes' own operations)
    y      += Σ over these j of x[:, j] · dequantize(Wq[:, j])  (here, one kernel that counts for itself)

Same outliers, same quantized values, same 16-bit values in the last sum; only the order of that float32 sum may
differ. Used for decoding in a CUDA graph; prefill and eager decoding stay bitsandbytes' own.
"""

from __future__ import annotations

from functools import cache
from typing import Any

NOTE = (
    "Decoded with the outliers of LLM.int8 selected on the GPU, in one kernel, which saves the synchronization with the "
    "host; the same outliers and the same values, summed in another order."
)


def product(x: Any, state: Any, bias: Any = None) -> Any:
    """`x` (…, features) → (…, outputs) in x's dtype, all of its rows at once. `state`: bitsandbytes' MatmulLtState."""
    import torch

    rows = x.reshape(-1, x.shape[-1])
    half = rows.to(torch.float16)
    cuda = x.device.type == "cuda"
    inner, columns = (_split_kernel if cuda else split)(half, state.threshold)
    quantized, scale, _ = torch.ops.bitsandbytes.int8_vectorwise_quant.default(inner, threshold=0.0)
    if len(rows) > 1:
        quantized = quantized.masked_fill(columns, 0)
    if bias is not None:
        bias = bias.to(x.dtype)
    out = torch.ops.bitsandbytes.int8_scaled_mm.default(
        quantized, state.CB, scale, state.SCB, bias=bias, dtype=x.dtype
    )
    add = _add_outliers_kernel if cuda else add_outliers
    return add(out, rows, columns, state.CB, state.SCB).view(*x.shape[:-1], -1)


def split(half: Any, threshold: float) -> tuple[Any, Any]:
    """(`half` with its outliers set to 0, bool (features,): an outlier in any row). What the kernel is tested against."""
    outliers = half.abs() >= threshold
    return half.masked_fill(outliers, 0), outliers.any(0)


def add_outliers(out: Any, rows: Any, columns: Any, weight: Any, scales: Any) -> Any:
    """The last line of the formula in plain torch: what the kernel is tested against."""
    import torch

    places = torch.nonzero(columns).view(-1)
    if not places.numel():
        return out
    values = torch.ops.bitsandbytes.int8_vectorwise_dequant.default(weight[:, places].contiguous(), scales)
    return out.addmm(rows[:, places].contiguous(), values.to(rows.dtype).t())


def _split_kernel(half: Any, threshold: float) -> tuple[Any, Any]:
    import torch

    (count, size), out = half.shape, torch.empty_like(half)
    columns = torch.empty(size, dtype=torch.bool, device=half.device)
    tall = min(64, 1 << (count - 1).bit_length())
    wide = max(32, 1024 // tall)
    _kernels()[0][(-(-size // wide),)](
        half, out, columns.view(torch.uint8), count, size, threshold, ROWS=tall, BLOCK=wide, num_warps=4
    )
    return out, columns


def _add_outliers_kernel(out: Any, rows: Any, columns: Any, weight: Any, scales: Any) -> Any:
    import torch

    (count, size), outputs = rows.shape, weight.shape[0]
    block = 1 << (size - 1).bit_length()
    _kernels()[1][(-(-outputs // 128), count)](
        out, rows, columns.view(torch.uint8), weight, scales, size, outputs,
        BLOCK=block, OUTPUTS=128, num_warps=4 if block <= 4096 else 8,
    )  # fmt: skip
    return out


@cache
def _kernels() -> tuple[Any, Any]:
    from comparator.backends.bnb import triton_outliers

    return triton_outliers.split, triton_outliers.add_outliers
