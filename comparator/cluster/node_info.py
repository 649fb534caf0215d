"""A node's versions, devices and memory, read on the node itself.

A node whose versions differ from the app's is refused, since its results would not be comparable.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from comparator.core import VERSION

COMPARED = ("Quant Comparator", "Python", "torch", "transformers")


@dataclass(frozen=True)
class Gpu:
    """A GPU's memory as reported by NVML."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class NodeInfo:
    """Versions, CPU, memory and GPUs of a node."""

    versions: dict[str, str]
    cpu: str
    cores: int
    memory_bytes: int
    memory_free_bytes: int
    gpus: tuple[Gpu, ...]


def look() -> NodeInfo:
    """The information on this machine. Takes milliseconds; imports no torch and uses no GPU."""
    import psutil

    from comparator.metrics.environment import cpu_name
    from comparator.metrics.memory import device_total_and_free

    total, free = device_total_and_free("cpu")
    return NodeInfo(versions(), cpu_name(), psutil.cpu_count() or 1, total, free, gpus())


def gpus() -> tuple[Gpu, ...]:
    """All GPUs of this machine from NVML, which ignores CUDA_VISIBLE_DEVICES."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        memory = [pynvml.nvmlDeviceGetMemoryInfo(handle) for handle in handles]
        return tuple(
            Gpu(str(pynvml.nvmlDeviceGetName(handle)), int(m.total), int(m.free))
            for handle, m in zip(handles, memory, strict=True)
        )
    except Exception:  # no NVML: no usable GPU
        return ()


@cache
def versions() -> dict[str, str]:
    """Versions that must be the same on all nodes. Builds of a torch release (+cpu, +cu130) count as the same."""
    installed = {"Quant Comparator": own_version(), "Python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("torch", "transformers"):
        try:
            installed[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            installed[name] = "none"
    return installed


@cache
def own_version() -> str:
    """The version with a checksum of the sources, to distinguish checkouts between releases."""
    folder, total = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        if "ui" not in path.relative_to(folder).parts[:1]:  # a node draws no page
            total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"{VERSION} ({total.hexdigest()[:8]})"


def skew(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    """How a node's versions differ from the app's, as text; None if they do not."""
    differing = [
        f"{name} {theirs.get(name, 'none')} there, {ours.get(name, 'none')} here"
        for name in COMPARED
        if ours.get(name) != theirs.get(name)
    ]
    return "; ".join(differing) or None
