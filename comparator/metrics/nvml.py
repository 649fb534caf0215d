"""The NVML handle of a torch device."""

from __future__ import annotations

from functools import cache
from typing import Any


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
