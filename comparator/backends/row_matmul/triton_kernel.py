"""The Triton kernel of `one_row.py`. Imported only where there is a CUDA device, and so Triton."""

import triton
import triton.language as tl


@triton.jit
def packed_row(
    x,
    codes,
    scale,
    zero,
    bias,
    out,
    stored,
    inputs,
    groups,
    FLOAT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BITS: tl.constexpr,
    PLANES: tl.constexpr,
    GROUPED: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Each program: ROWS rows of `codes` (stored, inputs), and so PLANES · ROWS outputs, GROUPS · GROUP inputs at a time.

    scale, zero: (outputs ÷ BLOCK_ROWS, groups); one per row of them where not GROUPED.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = rows < stored
    planes = tl.arange(0, PLANES)
    outputs = planes[:, None] * stored + rows[None, :]  # (PLANES, ROWS)
    scales = outputs // BLOCK_ROWS * groups
    shifts = BITS * (PLANES - 1 - planes)
    within = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]  # (GROUPS, GROUP)
    total = tl.zeros((PLANES, ROWS, GROUPS, GROUP), dtype=tl.float32)
    for start in range(0, inputs, GROUPS * GROUP):
        columns = start + within
        valid = columns < inputs
        value = tl.load(x + columns, mask=valid, other=0.0).to(tl.float32)
        code = tl.load(
            codes + rows[:, None, None].to(tl.int64) * inputs + columns[None, :, :],
            mask=inside[:, None, None] & valid[None, :, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        if PLANES > 1:
            whole = code.to(tl.int32)
            number = ((whole[None, :, :, :] >> shifts[:, None, None, None]) & ((1 << BITS) - 1)).to(
                tl.float32
            )
        else:
            # FP8 by way of fp16, which holds it exactly: there is an instruction for two at once.
            number = (code.to(tl.float16) if FLOAT else code).to(tl.float32)[None, :, :, :]
        if GROUPED:
            group = start // GROUP + tl.arange(0, GROUPS)
            at = scales[:, :, None] + group[None, None, :]
            known = inside[None, :, None] & (group < groups)[None, None, :]
            if HAS_ZERO:
                number -= tl.load(zero + at, mask=known, other=0.0).to(tl.float32)[:, :, :, None]
            number *= tl.load(scale + at, mask=known, other=0.0).to(tl.float32)[:, :, :, None]
        elif HAS_ZERO:
            offset = tl.load(zero + scales, mask=inside[None, :], other=0.0)
            number -= offset.to(tl.float32)[:, :, None, None]
        total += number * value[None, None, :, :]
    result = tl.sum(tl.sum(total, axis=3), axis=2)
    if not GROUPED:
        factor = tl.load(scale + scales, mask=inside[None, :], other=0.0)
        result *= factor.to(tl.float32)
    if HAS_BIAS:
        result += tl.load(bias + outputs, mask=inside[None, :], other=0.0).to(tl.float32)
    tl.store(out + outputs, result.to(out.dtype.element_ty), mask=inside[None, :])
