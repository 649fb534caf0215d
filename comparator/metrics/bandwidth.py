"""The roofline: a decode step takes at least the time of reading the weights once.

Bytes are counted from the tensors, bandwidth is measured with a copy on the same GPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from comparator.core.result import LayerRow

_measured: dict[str, float | None] = {}


def copy_bytes_s(device: str) -> float | None:
    """Bytes per second that a copy on the device reads plus writes, measured once per process. None on a CPU, where
    caches distort it, and if too little memory is free to measure it."""
    if device not in _measured:
        _measured[device] = _measure(device) if device.startswith("cuda") else None
    return _measured[device]


def _measure(device: str) -> float | None:
    import torch

    free, _ = torch.cuda.mem_get_info(device)
    size = min(2 * 2**30, free // 4)
    if size < 512 * 2**20:  # the L2 cache would distort it
        return None
    source = torch.empty(size // 4, dtype=torch.int32, device=device).random_()
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    del source, target
    torch.cuda.empty_cache()
    return 2 * size / statistics.median(times[2:])


def step_bytes(model: Any, rows: Iterable[LayerRow]) -> int:
    """Bytes of weights that one decode step reads: every stored weight with its quant state once, except the input
    embedding (one row of it is read) unless it is tied to the head. Keys and values are not counted, so the time is
    underestimated a little."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = head is not None and getattr(head, "weight", None) is getattr(embedding, "weight", None)
    left_out = set()
    if not shared:
        left_out = {name for name, module in model.named_modules() if module is embedding}
    return sum(r.bytes + r.quant_state_bytes for r in rows if r.name.rsplit(".", 1)[0] not in left_out)


def floor_tok_s(device: str, read_bytes: int) -> float | None:
    """The roofline: tokens per second (batch 1) if reading `read_bytes` per token takes the whole bandwidth."""
    rate = copy_bytes_s(device)
    return rate / read_bytes if rate and read_bytes else None
