"""The two Triton kernels of `outliers.py`. Imported only where there is a CUDA device, and so Triton."""

import triton
import triton.language as tl


@triton.jit
def split(half, out, columns, count, size, threshold, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out (count, size) = half where |half| < threshold, else 0; columns (size,) = 1 where any row has an outlier.

    Each program: BLOCK columns, ROWS rows at a time.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    found = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        inside = (row < count)[:, None] & (at < size)[None, :]
        place = row[:, None].to(tl.int64) * size + at[None, :]
        x = tl.load(half + place, mask=inside, other=0.0)
        outlier = tl.abs(x) >= threshold
        tl.store(out + place, tl.where(outlier, 0.0, x), mask=inside)
        found = tl.maximum(found, tl.max(outlier.to(tl.int32), axis=0))
    tl.store(columns + at, found.to(tl.uint8), mask=at < size)


@triton.jit
def add_outliers(
    out, rows, columns, weight, scales, size, outputs, BLOCK: tl.constexpr, OUTPUTS: tl.constexpr
):
    """out[r, n] += Σ over columns j with an outlier of rows[r, j] · (weight[n, j] · scales[n] / 127).

    Each program: one row, OUTPUTS outputs. It counts the columns for itself (they lie in the L2 cache), so nobody has to wait
    for a list.
    """
    at = tl.arange(0, BLOCK)
    outlier = tl.load(columns + at, mask=at < size, other=0) != 0
    count = tl.sum(outlier.to(tl.int32), axis=0)
    if count > 0:
        r = tl.program_id(1).to(tl.int64)
        n = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
        inside = n < outputs
        # float32 SCB × int8 ÷ 127, then the row's dtype, as int8_vectorwise_dequant and addmm see it.
        scale = tl.load(scales + n, mask=inside, other=0.0).to(tl.float32)
        total = tl.zeros((OUTPUTS,), dtype=tl.float32)
        last = tl.full((), -1, tl.int32)
        for _ in range(count):
            column = tl.min(tl.where(outlier & (at > last), at, BLOCK), axis=0)
            value = tl.load(rows + r * size + column)
            stored = tl.load(weight + n.to(tl.int64) * size + column, mask=inside, other=0).to(tl.float32)
            dequantized = (stored * scale * 0.007874015718698502).to(value.dtype)
            total += value.to(tl.float32) * dequantized.to(tl.float32)
            last = column
        before = tl.load(out + r * outputs + n, mask=inside, other=0.0)
        tl.store(out + r * outputs + n, (before.to(tl.float32) + total).to(before.dtype), mask=inside)
