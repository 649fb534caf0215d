"""One torch model on one device or several: which device works, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comparator.core.errors import UserError
from comparator.decoding.introspect import decoder_layers


def note(held: Mapping[tuple, int]) -> str | None:
    """For a column whose tensors lie on several devices: which, and how much on each."""
    devices: dict[str, int] = {}
    for (device, _), size in held.items():
        devices[device] = devices.get(device, 0) + size
    if len(devices) < 2:
        return None
    placed = ", ".join(f"{name} ({size / 1e6:,.0f} MB)" for name, size in sorted(devices.items()))
    return f"Spread over {placed}: layers run one device after the other, and activations cross between them."


def check_placed(model: Any, notation: str) -> None:
    """Raises `UserError` where accelerate found no place for a part, which it would keep on the disk."""
    placed = getattr(model, "hf_device_map", None) or {}
    if lost := [name for name, device in placed.items() if device == "disk"]:
        raise UserError(
            f"{len(lost)} parts of {notation} ({lost[0]} …) fit nowhere within max_memory.",
            "Raise a limit: accelerate places whole layers, and reserves memory on the first device.",
        )


def work_on(device: str) -> None:
    """Make this GPU torch's current one: what names no device (a stream, an event, a Triton kernel) goes there."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_device(device)


def follow(model: Any) -> None:
    """Where there are several GPUs, let each forward pass work on the GPU that the model lies on, layer by layer where
    it is spread: two models that take turns, one on each, change it every time."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() < 2:
        return

    def here(module: Any, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            work_on(module.comparator_device)

    for module in (model, *decoder_layers(model)):
        devices = [str(p.device) for p in module.parameters() if p.device.type == "cuda"]
        if devices:
            module.comparator_device = devices[0]
            module.register_forward_pre_hook(here)
