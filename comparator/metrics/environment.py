"""The machine and the versions that figures come from. No host names, no paths, no tokens."""

from __future__ import annotations

import importlib.metadata
import platform
from functools import cache
from pathlib import Path

import psutil

from comparator.types import Environment

PACKAGES = ("torch", "transformers", "bitsandbytes", "gptqmodel", "optimum", "peft", "accelerate", "gradio")


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
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    shown, driver, memory = cpu_name(), None, psutil.virtual_memory().total
    if device.startswith("cuda"):
        import torch

        properties = torch.cuda.get_device_properties(device)
        shown, memory, driver = properties.name, properties.total_memory, cuda_driver()
    return Environment(
        device=shown,
        driver=driver,
        cpu=cpu_name(),
        memory_bytes=memory,
        python=platform.python_version(),
        packages=packages,
    )


@cache
def cuda_driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # no NVML in this container: the driver stays unknown, which is shown as “–”
        return None
