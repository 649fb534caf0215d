"""Which device a variant goes to. `max_memory`: one model over several, within limits per device, and whether these can
hold it.
"""

from __future__ import annotations

from collections.abc import Mapping

from comparator.core.errors import UserError

Limits = dict[int | str, int]


def first_device(limits: Limits) -> str:
    """Where the model's inputs go: the first GPU that is named, else the CPU. Raises `UserError` for a GPU that is not
    there."""
    gpus = sorted(k for k in limits if isinstance(k, int))
    if not gpus:
        return "cpu"
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus[-1] >= count:
        there = f"The GPUs here are 0 to {count - 1}." if count > 1 else "The GPU here is 0." if count else ""
        raise UserError(
            f"max_memory names GPU {gpus[-1]}, and there is {'no such' if count else 'no'} GPU here.",
            f"{there} Name existing devices: 0=6GiB,cpu=20GiB; without a GPU cpu=20GiB.".strip(),
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
    """Raises `UserError` where the limits, or what is free behind them, cannot hold `needed` bytes."""
    if needed > sum(limits.values()):
        raise UserError(
            f"{notation} needs about {_gb(needed)}, and max_memory allows {_gb(sum(limits.values()))} in all "
            f"({_named(limits)}).",
            "Raise a limit, add cpu=…, or choose a smaller variant.",
        )
    free = {name: min(limit, _free(name)) for name, limit in limits.items()}
    if needed > sum(free.values()):
        raise UserError(
            f"{notation} needs about {_gb(needed)}, and of what max_memory allows {_gb(sum(free.values()))} is free "
            f"({_named(free)}).",
            "Unload other variants, or close other programs that use this memory.",
        )


def fits(limits: Limits, needed: int) -> bool:
    """Whether what is free now, within the limits, holds `needed` bytes."""
    return needed <= sum(min(limit, _free(name)) for name, limit in limits.items())


def _free(name: int | str) -> int:
    from comparator.metrics.memory import device_total_and_free

    return device_total_and_free("cpu" if name == "cpu" else f"cuda:{name}")[1]


def _named(limits: Limits) -> str:
    return ", ".join(f"{'GPU ' if isinstance(k, int) else ''}{k} {_gb(v)}" for k, v in limits.items())


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def pick_device() -> str:
    """The GPU with the most room, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{max(range(torch.cuda.device_count()), key=lambda i: torch.cuda.mem_get_info(i)[0])}"
