"""What a node has, asked on the node itself: versions, devices, memory. Knows nothing of placing or of models.

Versions are compared, not installed: a node whose libraries differ would answer with other figures under the same
name, so it is refused.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

COMPARED = ("Quant Comparator", "Python", "torch", "transformers")


@dataclass(frozen=True)
class Gpu:
    """Bytes as the driver counts them; `free_bytes` when it was asked."""

    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Found:
    """What a node says of itself."""

    versions: dict[str, str]
    cpu: str
    cores: int
    memory_bytes: int
    memory_free_bytes: int
    gpus: tuple[Gpu, ...]


def look() -> Found:
    """Of the machine this runs on. Some milliseconds; imports no torch and touches no GPU."""
    import psutil

    from comparator.metrics.environment import cpu_name
    from comparator.metrics.memory import device_total_and_free

    total, free = device_total_and_free("cpu")
    return Found(versions(), cpu_name(), psutil.cpu_count() or 1, total, free, gpus())


def gpus() -> tuple[Gpu, ...]:
    """By NVML, which sees all of a machine's GPUs whatever CUDA_VISIBLE_DEVICES says."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        found = []
        for handle in handles:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            found.append(Gpu(str(pynvml.nvmlDeviceGetName(handle)), int(memory.total), int(memory.free)))
        return tuple(found)
    except Exception:  # no NVML: no GPU that we could use
        return ()


@cache
def versions() -> dict[str, str]:
    """What has to be the same everywhere. Builds of one release of torch (+cpu, +cu130) are the same release."""
    found = {"Quant Comparator": own_version(), "Python": ".".join(platform.python_version_tuple()[:2])}
    for name in ("torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = "none"
    return found


@cache
def own_version() -> str:
    """The version with a checksum of the sources: two checkouts between releases are two versions."""
    import comparator

    folder, total = Path(comparator.__file__).parent, hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        if "ui" not in path.relative_to(folder).parts[:1]:  # a node draws no page
            total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return f"{comparator.__version__} ({total.hexdigest()[:8]})"


def skew(ours: dict[str, str], theirs: dict[str, str]) -> str | None:
    """How a node's versions differ from the app's, by name; None where they do not."""
    differing = [
        f"{name} {theirs.get(name, 'none')} there, {ours.get(name, 'none')} here"
        for name in COMPARED
        if ours.get(name) != theirs.get(name)
    ]
    return "; ".join(differing) or None
