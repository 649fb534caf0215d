"""The machine and the versions that results were measured with. No host names, no paths, no tokens."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from functools import cache
from pathlib import Path

import psutil

from comparator.backends import packages
from comparator.core.result import Environment


@cache
def cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
        else:
            name = platform.processor() or platform.machine()
    except OSError:
        name = platform.processor() or platform.machine()
    return f"{name}, {psutil.cpu_count() or '?'} cores"


def read(device: str) -> Environment:
    """The environment of a run on `device` ("cuda:0", "cpu")."""
    name, driver, memory = cpu_name(), None, psutil.virtual_memory().total
    if device.startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(device)
        name, memory, driver = properties.name, properties.total_memory, cuda_driver()
    return Environment(
        device=name,
        driver=driver,
        cpu=cpu_name(),
        memory_bytes=memory,
        python=platform.python_version(),
        packages=package_versions(),
    )


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that affect results: torch, transformers, and those of the backends."""
    versions = {}
    for name in dict.fromkeys((*packages(), "peft", "accelerate", "gradio")):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


@cache
def cuda_driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # no NVML in this container: shown as “–”
        return None
