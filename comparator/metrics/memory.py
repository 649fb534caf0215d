"""Bytes of tensors, counted once per storage, and memory peaks of CUDA's allocator or the process."""

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

from comparator.util.compat import accelerate
from comparator.util.compat.torch import clear_cublas_workspaces, wrapped_tensors

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
RESERVE_BYTES = 256 * 2**20  # activations and workspaces of one run, kept free wherever something is loaded


def nbytes(tensor: Any) -> int:
    return tensor.numel() * tensor.element_size()


def storage_key(tensor: Any) -> tuple:
    """Identifies a storage: two tensors with the same key share their bytes."""
    return (str(tensor.device), tensor.untyped_storage().data_ptr()) if tensor.numel() else (id(tensor), 0)


def unique_bytes(tensors: Iterable[Any]) -> int:
    """Bytes of the tensors, each storage once, as the largest of the views into it."""
    sizes: dict[tuple, int] = {}
    for tensor in tensors:
        key = storage_key(tensor)
        sizes[key] = max(sizes.get(key, 0), nbytes(tensor))
    return sum(sizes.values())


def held_tensors(model: Any) -> Iterator[Any]:
    """Every tensor that a module tree refers to: parameters, buffers (also non-persistent ones), tensors inside tensor
    subclasses, and attributes of modules, parameters and the quantization libraries' objects (quant states, caches)."""
    import torch

    from comparator.backends import libraries

    visited, quantization = set(), libraries()
    stack: list[Any] = [model]
    while stack:
        item = stack.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, torch.nn.Module):
            stack.extend(accelerate.offloaded(item))
        if isinstance(item, torch.Tensor):
            if (wrapped := wrapped_tensors(item)) is not None:
                stack.extend(wrapped)
            elif item.device.type != "meta":  # accelerate's placeholder of an offloaded tensor
                yield item
            stack.extend(v for k, v in getattr(item, "__dict__", {}).items() if k != "module")
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            stack.extend(item)
        elif isinstance(item, torch.nn.Module) or type(item).__module__.startswith(quantization):
            stack.extend(getattr(item, "__dict__", {}).values())


def cache_bytes(cache: Any) -> int | None:
    """Bytes of a transformers KV cache, keys and values of every layer; None for None."""
    import torch

    if cache is None:
        return None
    tensors: list[Any] = []
    stack, visited = [cache], set()
    while stack:
        item = stack.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, torch.Tensor):
            tensors.append(item)
        elif isinstance(item, (list, tuple)):
            stack.extend(item)
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif hasattr(item, "__dict__") and any(
            c.__module__.startswith("transformers") for c in type(item).__mro__
        ):
            stack.extend(v for k, v in vars(item).items() if k != "config")
    return unique_bytes(tensors)


@dataclass
class Peak:
    """Filled when the `with` block ends. `above_bytes`: the peak minus `start_bytes`."""

    source: str
    start_bytes: int = 0
    above_bytes: int | None = None


@contextlib.contextmanager
def track(device: str) -> Iterator[Peak]:
    """Measures the memory peak of the block."""
    yield from (_track_cuda(device) if device.startswith("cuda") else _track_process())


def _track_cuda(device: str) -> Iterator[Peak]:
    import torch

    torch.cuda.synchronize(device)  # kernels queued before must not count
    torch.cuda.reset_peak_memory_stats(device)
    peak = Peak("CUDA allocator", torch.cuda.memory_allocated(device))
    try:
        yield peak
    finally:
        torch.cuda.synchronize(device)
        peak.above_bytes = torch.cuda.max_memory_allocated(device) - peak.start_bytes


def _track_process() -> Iterator[Peak]:
    peak = Peak("process (resident set)", resident_set())
    kernel_peak = _reset_high_water_mark()
    sampler = None if kernel_peak else _Sampler()
    try:
        yield peak
    finally:
        highest = sampler.stop() if sampler else _high_water_mark()
        peak.above_bytes = max(0, highest - peak.start_bytes)


def resident_set() -> int:
    return psutil.Process().memory_info().rss


def _reset_high_water_mark() -> bool:
    """Reset the peak of the resident set, which Linux records exactly. Returns whether that worked."""
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
    """Samples the resident set every 5 ms where the kernel records no peak (macOS)."""

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
    """Return memory that torch and malloc cache to the device and the system."""
    gc.collect()
    import torch

    if torch.cuda.is_available():
        clear_cublas_workspaces()
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def unfragmented(device: str) -> Iterator[None]:
    """While open on a CPU, malloc maps every block from 128 KiB on by itself, and unmaps it as soon as it is freed.

    glibc raises that limit, up to 32 MiB, each time such a block is freed. The temporary tensors of quantizing then lie
    between the weights that stay, and what they leave free is not returned: 170 MB for a model of 113 MB. Afterwards the limits are
    the highest that glibc sets by itself, so that decoding does not map and unmap its tensors.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        mallopt = None
    if mallopt is None or device != "cpu":
        yield
        return
    give_back()  # what is free already does not count as the process's before the block
    mallopt(_M_MMAP_THRESHOLD, 128 * 2**10)
    try:
        yield
    finally:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)


def used(device: str) -> int:
    """Bytes in use on a device: in CUDA's allocator, or on the CPU by the process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.memory_allocated(device)
    return resident_set()


def device_total_and_free(device: str) -> tuple[int, int]:
    """(total, free) bytes of a device; for the CPU within the container's limit."""
    if device.startswith("cuda"):
        import torch

        free, total = torch.cuda.mem_get_info(device)
        # What torch has cached but does not use is free too.
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
