"""The two Triton kernels of `outliers.py`. Imported only where there is a CUDA device, and so Triton."""

import triton
import triton.language as tl


@triton.jit
def without_outliers(half, out, size, threshold, BLOCK: tl.constexpr):
    """out = half where |half| < threshold, else 0."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(half + at, mask=at < size, other=0.0)
    tl.store(out + at, tl.where(tl.abs(x) >= threshold, 0.0, x), mask=at < size)


@triton.jit
def add_outliers(
    out, row, half, weight, scales, size, outputs, threshold, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    """out[r] += Σ over columns j with |half[j]| ≥ threshold of row[j] · (weight[r, j] · scales[r] / 127).

    Every program counts the outliers for itself (the row lies in the L2 cache), so nobody has to wait for a list.
    """
    at = tl.arange(0, BLOCK)
    x = tl.load(half + at, mask=at < size, other=0.0)
    outlier = tl.abs(x) >= threshold
    count = tl.sum(outlier.to(tl.int32), axis=0)
    if count > 0:
        rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        inside = rows < outputs
        # float32 SCB × int8 ÷ 127, then the row's dtype, as int8_vectorwise_dequant and addmm see it.
        scale = tl.load(scales + rows, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((ROWS,), dtype=tl.float32)
        last = tl.full((), -1, tl.int32)
        for _ in range(count):
            column = tl.min(tl.where(outlier & (at > last), at, BLOCK), axis=0)
            value = tl.load(row + column)
            stored = tl.load(weight + rows.to(tl.int64) * size + column, mask=inside, other=0).to(tl.float32)
            dequantized = (stored * scale * 0.007874015718698502).to(value.dtype)
            total += value.to(tl.float32) * dequantized.to(tl.float32)
            last = column
        before = tl.load(out + rows, mask=inside, other=0.0)
        tl.store(out + rows, (before.to(tl.float32) + total).to(before.dtype), mask=inside)
