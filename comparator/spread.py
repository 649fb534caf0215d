"""`max_memory`: one model over several devices, within limits a device, by accelerate's device map.

What the limits mean, whether they can hold a variant, and where a tensor really lies that accelerate parks on the
CPU. Knows nothing of methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comparator.types import Problem

Limits = dict[int | str, int]


def first_device(limits: Limits) -> str:
    """Where the model's inputs go: the first GPU that is named, else the CPU. Raises `Problem` for a GPU that is not
    there."""
    gpus = sorted(k for k in limits if isinstance(k, int))
    if not gpus:
        return "cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus[-1] >= count:
        there = f"The GPUs here are 0 to {count - 1}." if count > 1 else "The GPU here is 0." if count else ""
        raise Problem(
            f"max_memory names GPU {gpus[-1]}, and there is {'no such' if count else 'no'} GPU here.",
            f"{there} Name what is there: 0=6GiB,cpu=20GiB; without a GPU cpu=20GiB.".strip(),
        )
    return f"cuda:{gpus[0]}"


def automatic(needed: int, reserve: int, rooms: Mapping[int, int] | None = None) -> Limits | None:
    """Limits for a variant that no single GPU here can hold even when empty, and all together can: every GPU less
    `reserve` bytes for a run. None where one GPU is enough, and where all are not. `rooms`: bytes of each GPU."""
    rooms = gpu_bytes() if rooms is None else rooms
    usable = {gpu: size - reserve for gpu, size in rooms.items() if size > reserve}
    if len(usable) < 2 or needed <= max(usable.values()) or needed > sum(usable.values()):
        return None
    return dict(sorted(usable.items()))


def within_free(limits: Limits, reserve: int) -> Limits:
    """The limits cut down to what is free now, so that accelerate places nothing where others lie."""
    return {name: max(0, min(limit, _free(name) - reserve)) for name, limit in limits.items()}


def gpu_bytes() -> dict[int, int]:
    """All memory of each GPU here."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {gpu: torch.cuda.get_device_properties(gpu).total_memory for gpu in range(count)}


def check(limits: Limits, needed: int, notation: str) -> None:
    """Raises `Problem` where the limits, or what is free behind them, cannot hold `needed` bytes."""
    if needed > sum(limits.values()):
        raise Problem(
            f"{notation} needs about {_gb(needed)}, and max_memory allows {_gb(sum(limits.values()))} in all "
            f"({_named(limits)}).",
            "Raise a limit, add cpu=…, or choose a smaller variant.",
        )
    free = {name: min(limit, _free(name)) for name, limit in limits.items()}
    if needed > sum(free.values()):
        raise Problem(
            f"{notation} needs about {_gb(needed)}, and of what max_memory allows {_gb(sum(free.values()))} is free "
            f"({_named(free)}).",
            "Unload other variants, or close other programs that use this memory.",
        )


def fits(limits: Limits, needed: int) -> bool:
    """Whether what is free now, within the limits, holds `needed` bytes."""
    return needed <= sum(min(limit, _free(name)) for name, limit in limits.items())


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
    """Raises `Problem` where accelerate found no place for a part, which it would keep on the disk."""
    placed = getattr(model, "hf_device_map", None) or {}
    if lost := [name for name, device in placed.items() if device == "disk"]:
        raise Problem(
            f"{len(lost)} parts of {notation} ({lost[0]} …) fit nowhere within max_memory.",
            "Raise a limit: accelerate places whole layers, and keeps room on the first device.",
        )


def work_on(device: str) -> None:
    """Make this GPU torch's current one: what names no device (a stream, an event, a Triton kernel) goes there."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.set_device(device)


def follow(model: Any) -> None:
    """Where there are several GPUs, let each forward pass work on the GPU that the model lies on, layer by layer where
    it is spread: two models that take turns, one on each, change it every time."""
    if len(gpu_bytes()) < 2:
        return
    import torch

    from comparator.generate import decoder_layers

    def here(module: Any, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            work_on(module.comparator_device)

    for module in (model, *decoder_layers(model)):
        devices = [str(p.device) for p in module.parameters() if p.device.type == "cuda"]
        if devices:
            module.comparator_device = devices[0]
            module.register_forward_pre_hook(here)


def real(module: Any, name: str, tensor: Any) -> Any:
    """The tensor itself. accelerate leaves a placeholder where it moves a weight to the GPU at each use."""
    if tensor.device.type != "meta":
        return tensor
    for hook in _hooks(module):
        try:
            return hook.weights_map[name]
        except (KeyError, TypeError, AttributeError):
            continue
    return tensor


def parked(module: Any) -> list[Any]:
    """The tensors of a module that accelerate keeps on the CPU."""
    own = [*module._parameters.items(), *module._buffers.items()]
    found = [real(module, name, t) for name, t in own if t is not None and t.device.type == "meta"]
    return [t for t in found if t.device.type != "meta"]


def _hooks(module: Any) -> list[Any]:
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def _free(name: int | str) -> int:
    from comparator.metrics.memory import device_total_and_free

    return device_total_and_free("cpu" if name == "cpu" else f"cuda:{name}")[1]


def _named(limits: Limits) -> str:
    return ", ".join(f"{'GPU ' if isinstance(k, int) else ''}{k} {_gb(v)}" for k, v in limits.items())


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
