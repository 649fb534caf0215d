"""NVIDIA's management library: how many GPUs there are, and its handle of a torch device."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def gpus() -> int:
    """NVIDIA GPUs of this machine; 0 without a driver. Imports no torch."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetCount()
    except Exception:  # no driver, or not allowed in this container
        return 0


@cache
def handle(device: str) -> Any | None:
    """NVML's handle of a CUDA device ("cuda:0"), looked up once; None without NVML, a GPU or the permission."""
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except Exception:  # no driver, or not allowed in this container
        return None
