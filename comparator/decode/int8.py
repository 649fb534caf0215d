"""LLM.int8() with its outlier threshold, for one token, without the host.

bitsandbytes asks the GPU which input features hold an outlier and waits for the answer (`outliers.any()`), once a
layer: no graph can hold that, and 7 of 8 tok/s are lost to it. For a single row the question can stay on the device:

    x₀      = x with the outliers set to 0                      (bitsandbytes' kernel leaves them out likewise)
    y       = dequantize(quantize(x₀) · Wq)                     (bitsandbytes' own operations)
    y      += Σ over outliers j of x[j] · dequantize(Wq[:, j])  (here, one kernel that counts for itself)

Same outliers, same quantized values, same 16-bit values in the last sum; only the order of that float32 sum may
differ. Used for decoding in a graph; prefill and eager decoding stay bitsandbytes' own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from comparator.decode.instead import instead

NOTE = (
    "Decoded with the outliers of LLM.int8 picked on the GPU, one kernel in place of bitsandbytes' question to the "
    "host; the same outliers and the same values, added up in another order."
)


def _with_outliers(model: Any) -> list[Any]:
    """bitsandbytes' layers with a threshold. peft's wrapper around one has the same class name and no state."""
    return [
        m
        for m in model.modules()
        if type(m).__name__ == "Linear8bitLt"
        and type(m).__module__.startswith("bitsandbytes")
        and m.state.threshold > 0
    ]


@contextlib.contextmanager
def capturable(model: Any) -> Iterator[tuple[str, ...]]:
    """Inside, int8 layers with a threshold take the form above. Yields notes for the column."""
    layers = _with_outliers(model)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(instead(layer, _forward(layer)))
        yield (NOTE,) if layers else ()


def furthest(model: Any, step: Callable[[], Any]) -> tuple[Any, float | None]:
    """Run `step`, a decode step on bitsandbytes' own layers, and compare the one-row form with each of them on what
    it is fed: (what `step` gave, the largest ‖difference‖ / ‖own output‖, None for a model without such layers).

    A whole model says little here: one activation that rounds the other way moves everything after it.
    """
    layers = _with_outliers(model)
    found: list[float] = []

    def compare(layer: Any, inputs: tuple, output: Any) -> None:
        form = one_row(inputs[0], layer.state, layer.bias).float()
        found.append(float((form - output.float()).norm() / output.float().norm().clamp_min(1e-9)))

    hooks = [layer.register_forward_hook(compare) for layer in layers]
    try:
        result = step()
    finally:
        for hook in hooks:
            hook.remove()
    return result, max(found) if found else None


def _forward(layer: Any) -> Any:
    def forward(x, *_, **__):
        return one_row(x, layer.state, layer.bias)

    forward.comparator_opaque = True
    return forward


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
    from comparator.decode import int8_kernels

    return int8_kernels.without_outliers, int8_kernels.add_outliers
