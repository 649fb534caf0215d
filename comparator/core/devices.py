"""Detects and marks columns that ran on different kinds of devices.

Where all columns ran in one place, their `environment` is None: it is the comparison's.
"""

from __future__ import annotations

from collections.abc import Iterable

from comparator.core.result import CellResult, Environment

MARK = "≠"  # beside a ratio: the two were measured on unlike devices
MEANING = f"{MARK} marks a ratio between unlike devices: it compares them as much as the variants."


def kind(environment: Environment) -> tuple:
    """What two devices have to share to be alike: device, driver and torch's version, not the host."""
    return environment.device, environment.driver, environment.packages.get("torch")


def across(cell: CellResult | None, reference: CellResult | None) -> bool:
    """Whether the two columns ran on unlike devices."""
    ours = cell.environment if cell else None
    theirs = reference.environment if reference else None
    return ours is not None and theirs is not None and kind(ours) != kind(theirs)


def mark(cell: CellResult | None, reference: CellResult | None) -> str:
    return MARK if across(cell, reference) else ""


def place(environment: Environment) -> str:
    """The device and the host it is in: “NVIDIA H200 (gpu-2)”."""
    device = environment.device or "an unknown device"
    return f"{device} ({environment.host})" if environment.host else device


def unlike(cells: Iterable[CellResult]) -> str:
    """A warning if the columns ran on unlike devices; "" otherwise."""
    measured = [c for c in cells if c.environment is not None]
    if len({kind(c.environment) for c in measured}) < 2:
        return ""
    labels_by_place: dict[str, list[str]] = {}
    for cell in measured:
        labels_by_place.setdefault(place(cell.environment), []).append(cell.label)
    devices = "; ".join(f"{', '.join(names)} on {device}" for device, names in labels_by_place.items())
    return f"Compared across unlike devices: {devices}. {MEANING}"
