"""Short dtype names (`bf16`) ↔ torch dtypes and their source text, and whether a device multiplies bf16
natively.
"""

from __future__ import annotations

from typing import Any

_TORCH_NAMES = {"fp32": "torch.float32", "fp16": "torch.float16", "bf16": "torch.bfloat16"}


_SHORT_NAMES = {v.removeprefix("torch."): k for k, v in _TORCH_NAMES.items()}


def torch_name(short: str) -> str:
    """`bf16` → `torch.bfloat16`, as source text."""
    return _TORCH_NAMES.get(short, f"torch.{short}")


def torch_dtype(short: str) -> Any:
    """`bf16` → the torch dtype."""
    import torch

    return getattr(torch, torch_name(short).removeprefix("torch."))


def short_name(dtype: Any) -> str:
    """A torch dtype → `bf16`, `uint8` …"""
    name = str(dtype).removeprefix("torch.")
    return _SHORT_NAMES.get(name, name)


def supports_bf16(device: str) -> bool:
    if not device.startswith("cuda"):
        return True
    import torch

    # Emulated bf16 (Turing and older) would time the emulation, not the card.
    return torch.cuda.get_device_capability(device)[0] >= 8


def reads_fp8(device: str) -> bool:
    """Whether `device` is a GPU here that converts FP8 in hardware (Ada, Hopper and later)."""
    import torch

    cuda = device.startswith("cuda") and torch.cuda.is_available()
    return cuda and torch.cuda.get_device_capability(device) >= (8, 9)
