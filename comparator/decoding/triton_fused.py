"""Triton kernels for `fused_ops.py`. Imported only with a CUDA device, since Triton needs one."""

import triton
import triton.language as tl


@triton.jit
def rounded(x, like):
    """float32 → the nearest value of the dtype `like`, still float32. On the bits, since the compiler removes a
    conversion there and back, and the result would differ from the eager one."""
    if like == tl.float32:
        return x
    bits = x.to(tl.int32, bitcast=True)
    if like == tl.bfloat16:
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return tl.where(x == x, even.to(tl.float32, bitcast=True), x)
    else:
        even = (bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000
        near = tl.where(x == x, even.to(tl.float32, bitcast=True), x)
        near = tl.where(tl.abs(near) > 65504.0, near * float("inf"), near)
        # Below the smallest normal fp16 values are 2^-24 apart, as float32's are near 0.75.
        return tl.where(tl.abs(x) < 6.103515625e-05, (x + 0.75) - 0.75, near)


@triton.jit
def squares(x, out, count, BLOCK: tl.constexpr):
    """x² in float32."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wide = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32)
    tl.store(out + at, wide * wide, mask=at < count)


@triton.jit
def normalize(x, weight, variance, out, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """One program per part of a row: weight · round(x / √(variance + eps)), rounded where transformers rounds."""
    row = tl.program_id(0)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < SIZE
    values = tl.load(x + row * SIZE + at, mask=mask, other=0.0)
    scale = tl.rsqrt(tl.load(variance + row) + eps)
    scales = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    result = scales * rounded(values.to(tl.float32) * scale, values.dtype)
    tl.store(out + row * SIZE + at, result.to(values.dtype), mask=mask)


@triton.jit
def rotate(
    q, k, q_out, k_out, cos, sin, q_batch, q_head, k_batch, k_head, table_batch,
    Q_HEADS: tl.constexpr, K_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per head, those of q first: x · cos + rotate_half(x) · sin, rounded after each product and the sum."""
    batch = tl.program_id(1)
    head = tl.program_id(0)
    if head < Q_HEADS:
        source = q + batch * q_batch + head * q_head
        target = q_out + (batch * Q_HEADS + head) * 2 * HALF
    else:
        source = k + batch * k_batch + (head - Q_HEADS) * k_head
        target = k_out + (batch * K_HEADS + head - Q_HEADS) * 2 * HALF
    at = tl.arange(0, BLOCK)
    mask = at < HALF
    low = tl.load(source + at, mask=mask, other=0.0)
    high = tl.load(source + HALF + at, mask=mask, other=0.0)
    cosines, sines = cos + batch * table_batch, sin + batch * table_batch
    for part in tl.static_range(2):
        c = tl.load(cosines + part * HALF + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(sines + part * HALF + at, mask=mask, other=0.0).to(tl.float32)
        if part == 0:
            straight, crossed = low.to(tl.float32), -high.to(tl.float32)
        else:
            straight, crossed = high.to(tl.float32), low.to(tl.float32)
        one, other = rounded(straight * c, low.dtype), rounded(crossed * s, low.dtype)
        tl.store(target + part * HALF + at, (one + other).to(low.dtype), mask=mask)


@triton.jit
def attend(
    q, keys, values, position, partial, weights, out, scaling,
    q_batch, q_head, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, CAPACITY: tl.constexpr, CHUNK: tl.constexpr,
    SPLITS: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One token's attention over one chunk of the cache, for the query heads that share one key head.

    Slots after `position` are never read. With one split the result is `out`; otherwise `partial` gets the chunk's
    weighted sum of values, and `weights` its (maximum, sum) for `combine`.
    """
    split = tl.program_id(1)
    pair = tl.program_id(0)  # (sequence, key head)
    batch, kv_head = pair // KV_HEADS, pair % KV_HEADS
    length = tl.load(position).to(tl.int32) + 1
    row, column = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    heads = kv_head * GROUP + row
    query = tl.load(
        q + batch * q_batch + heads[:, None] * q_head + column[None, :],
        mask=(row < GROUP)[:, None] & (column < SIZE)[None, :], other=0.0,
    )  # fmt: skip
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, WIDTH), tl.float32)
    base = pair.to(tl.int64) * CAPACITY * SIZE
    first = split * CHUNK
    last = tl.minimum(first + CHUNK, length)
    for start in range(first, last, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        mask = (slot < last)[:, None] & (column < SIZE)[None, :]
        place = base + slot[:, None].to(tl.int64) * SIZE + column[None, :]
        key = tl.load(keys + place, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scaling
        scores = tl.where((slot < last)[None, :], scores, float("-inf"))
        highest = tl.maximum(best, tl.max(scores, axis=1))
        shrink = tl.exp(best - highest)
        share = tl.exp(scores - highest[:, None])
        total = total * shrink + tl.sum(share, axis=1)
        value = tl.load(values + place, mask=mask, other=0.0)
        mixed = mixed * shrink[:, None] + tl.dot(share.to(value.dtype), value, input_precision=PRECISION)
        best = highest
    rows = batch * KV_HEADS * GROUP + heads
    real = row < GROUP
    if SPLITS == 1:
        place = rows[:, None] * SIZE + column[None, :]
        result = (mixed / total[:, None]).to(out.dtype.element_ty)
        tl.store(out + place, result, mask=real[:, None] & (column < SIZE)[None, :])
    else:
        # Of a chunk after `position` nothing was read, and its weight in `combine` is 0.
        at = rows * SPLITS + split
        tl.store(
            partial + at[:, None] * SIZE + column[None, :],
            mixed,
            mask=real[:, None] & (column < SIZE)[None, :],
        )
        tl.store(weights + at * 2, best, mask=real)
        tl.store(weights + at * 2 + 1, total, mask=real)


@triton.jit
def combine(
    partial, weights, out, SPLITS: tl.constexpr, BLOCK: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr
):
    """One program per query head: the chunks' sums, weighted by their shares of the softmax."""
    head = tl.program_id(0)
    split, column = tl.arange(0, BLOCK), tl.arange(0, WIDTH)
    valid = split < SPLITS
    at = head * SPLITS + split
    best = tl.load(weights + at * 2, mask=valid, other=float("-inf"))
    total = tl.load(weights + at * 2 + 1, mask=valid, other=0.0)
    share = tl.exp(best - tl.max(best, axis=0))
    mixed = tl.load(
        partial + at[:, None] * SIZE + column[None, :],
        mask=valid[:, None] & (column < SIZE)[None, :],
        other=0.0,
    )
    result = tl.sum(mixed * share[:, None], axis=0) / tl.sum(total * share, axis=0)
    tl.store(out + head * SIZE + column, result.to(out.dtype.element_ty), mask=column < SIZE)


# ---------------------------------------------------------------- launching; same signatures as in `reference_ops`

_PROGRAMS = 264  # two per multiprocessor of the largest cards, enough to saturate the memory bandwidth
_SHORTEST_CHUNK, _MOST_CHUNKS = 64, 64


def launch_rms_norm(x, weight, epsilon):
    import torch

    x, size = x.contiguous(), x.shape[-1]
    rows, block = x.numel() // size, min(1024, triton.next_power_of_2(size))
    squared, out = x.new_empty(x.shape, dtype=torch.float32), x.new_empty(x.shape)
    squares[(triton.cdiv(x.numel(), 1024),)](x, squared, x.numel(), BLOCK=1024, num_warps=4)
    # PyTorch's own mean: another order of summation would change the rounding of some values.
    variance = squared.mean(-1)
    grid = (rows, triton.cdiv(size, block))
    normalize[grid](x, weight, variance, out, epsilon, SIZE=size, BLOCK=block, num_warps=4)
    return out


def launch_rotate(q, k, cos, sin):
    batch, heads, _, size = q.shape
    key_heads = k.shape[1]
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    cos, sin = cos.contiguous(), sin.contiguous()
    table = cos.stride(0) if cos.shape[0] > 1 else 0
    rotate[(heads + key_heads, batch)](
        q, k, q_out, k_out, cos, sin, q.stride(0), q.stride(1), k.stride(0), k.stride(1), table,
        Q_HEADS=heads, K_HEADS=key_heads, HALF=size // 2, BLOCK=triton.next_power_of_2(size // 2), num_warps=1,
    )  # fmt: skip
    return q_out, k_out


def launch_attend(query, keys, values, position, scaling):
    import torch

    batch, heads, _, size = query.shape
    key_heads, capacity = keys.shape[1:3]
    group, width = heads // key_heads, max(16, triton.next_power_of_2(size))
    splits, chunk = _chunks(batch * key_heads, capacity)
    out = query.new_empty((batch, 1, heads, size))
    partial = weights = out
    if splits > 1:
        partial = query.new_empty((batch * heads, splits, size), dtype=torch.float32)
        weights = query.new_empty((batch * heads, splits, 2), dtype=torch.float32)
    exact = query.dtype == torch.float32
    attend[(batch * key_heads, splits)](
        query, keys, values, position, partial, weights, out, scaling, query.stride(0), query.stride(1),
        KV_HEADS=key_heads, GROUP=group, CAPACITY=capacity, CHUNK=chunk, SPLITS=splits, SIZE=size,
        ROWS=max(16, triton.next_power_of_2(group)), BLOCK=32 if exact else 64, WIDTH=width,
        PRECISION="ieee" if exact else "tf32", num_warps=4,
    )  # fmt: skip
    if splits > 1:
        combine[(batch * heads,)](
            partial, weights, out, SPLITS=splits, BLOCK=triton.next_power_of_2(splits), SIZE=size, WIDTH=width,
            num_warps=4,
        )  # fmt: skip
    return out


def _chunks(pairs: int, capacity: int) -> tuple[int, int]:
    """(number of chunks, slots per chunk) of a cache; `pairs`: sequences × key heads."""
    count = min(max(1, _PROGRAMS // pairs), _MOST_CHUNKS, max(1, capacity // _SHORTEST_CHUNK))
    chunk = -(-capacity // (count * _SHORTEST_CHUNK)) * _SHORTEST_CHUNK
    return -(-capacity // chunk), chunk
