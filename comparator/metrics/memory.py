"""Bytes: of tensors, counted once per storage, and peaks, from CUDA's allocator or the process.

Knows nothing of methods: what a weight's quant state is, the backend says.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from comparator import spread


def nbytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def storage_key(tensor: Any) -> tuple:
    """Identifies a storage: two tensors with the same key are the same bytes."""
    return (str(tensor.device), tensor.untyped_storage().data_ptr()) if tensor.numel() else (id(tensor), 0)


def unique_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors, each storage once; of two views into one storage the larger counts."""
    sizes: dict[tuple, int] = {}
    for tensor in tensors:
        key = storage_key(tensor)
        sizes[key] = max(sizes.get(key, 0), nbytes(tensor))
    return sum(sizes.values())


def held_tensors(model: Any) -> Iterator[Any]:
    """Every tensor that a module tree holds, wherever it hides: parameters, buffers (also those that are not
    saved), and attributes of modules and parameters (quant states, caches of unpacked weights)."""
    import torch

    seen: set[int] = set()
    stack: list[Any] = [model]
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.nn.Module) and hasattr(item, "_hf_hook"):
            stack.extend(spread.parked(item))
        if isinstance(item, torch.Tensor):
            if item.device.type != "meta":  # a placeholder: the tensor itself is parked
                yield item
            stack.extend(v for k, v in vars(item).items() if k != "module") if hasattr(
                item, "__dict__"
            ) else None
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            stack.extend(item)
        elif isinstance(item, torch.nn.Module) or type(item).__module__.startswith(
            ("bitsandbytes", "gptqmodel")
        ):
            stack.extend(vars(item).values() if hasattr(item, "__dict__") else ())


def cache_bytes(cache: Any) -> int | None:
    """Bytes of a transformers KV cache as it stands, keys and values of every layer; None where there is none."""
    import torch

    if cache is None:
        return None
    found: list[Any] = []
    stack, seen = [cache], set()
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif type(item).__module__.startswith("transformers") and hasattr(item, "__dict__"):
            stack.extend(v for k, v in vars(item).items() if k != "config")
    return unique_bytes(found)


@dataclass
class Peak:
    """Filled when the `with` block ends. `above_bytes`: how far the peak rose above what was there at its start."""

    source: str
    start_bytes: int = 0
    above_bytes: int | None = None
    end_bytes: int | None = None  # what is there when the block ends


@contextlib.contextmanager
def track(device: str) -> Iterator[Peak]:
    """The peak of what runs inside, and of nothing before it."""
    yield from (_track_cuda(device) if device.startswith("cuda") else _track_process())


def _track_cuda(device: str) -> Iterator[Peak]:
    import torch

    torch.cuda.synchronize(device)  # what was queued before must not count
    torch.cuda.reset_peak_memory_stats(device)
    peak = Peak("CUDA allocator", torch.cuda.memory_allocated(device))
    try:
        yield peak
    finally:
        torch.cuda.synchronize(device)
        peak.above_bytes = torch.cuda.max_memory_allocated(device) - peak.start_bytes
        peak.end_bytes = torch.cuda.memory_allocated(device)


def _track_process() -> Iterator[Peak]:
    peak = Peak("process (resident set)", resident_set())
    kernel_peak = _reset_high_water_mark()
    sampler = None if kernel_peak else _Sampler()
    try:
        yield peak
    finally:
        highest = sampler.stop() if sampler else _high_water_mark()
        peak.end_bytes = resident_set()
        peak.above_bytes = max(0, highest - peak.start_bytes)


def resident_set() -> int:
    return psutil.Process().memory_info().rss


def _reset_high_water_mark() -> bool:
    """Linux keeps the peak of the resident set itself and lets a process reset it: exact, and no thread."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _high_water_mark() > 0
    except OSError:
        return False


def _high_water_mark() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


class _Sampler:
    """Where the kernel keeps no peak (macOS): look every 5 ms."""

    def __init__(self):
        self.highest, self.ended = resident_set(), threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        process = psutil.Process()
        while not self.ended.wait(0.005):
            self.highest = max(self.highest, process.memory_info().rss)

    def stop(self) -> int:
        self.ended.set()
        self.thread.join()
        return max(self.highest, resident_set())


def give_back() -> None:
    """Return freed memory to the device and the system, so that what is free is really free."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        # 32 MiB a stream on Hopper. Recorded graphs keep theirs in their own pool, so nothing in use goes.
        if clear := getattr(torch._C, "_cuda_clearCublasWorkspaces", None):
            clear()
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def device_total_and_free(device: str) -> tuple[int, int]:
    """(total, free) bytes of a device; for the CPU what the system says is available."""
    if device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(device)
        # What torch keeps cached but unused is free for us.
        return total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    memory = psutil.virtual_memory()
    return _container_limit(memory.total), min(memory.available, _container_free(memory.available))


def _container_limit(total: int) -> int:
    limit = _cgroup("memory.max")
    return min(total, limit) if limit else total


def _container_free(available: int) -> int:
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return max(0, limit - used) if limit and used is not None else available


def _cgroup(name: str) -> int | None:
    try:
        text = Path("/sys/fs/cgroup", name).read_text().strip()
        return int(text) if text.isdigit() else None
    except OSError:
        return None
