"""Detects and marks columns that ran on different kinds of devices.

The `environment` of a column that ran on the comparison's own device is None.
"""

from __future__ import annotations

from collections.abc import Iterable

from comparator.core.result import CellResult, Environment

MARK = "≠"  # beside a ratio: the two were measured on unlike devices
MEANING = f"{MARK} marks a ratio between different devices: it compares the devices as well as the variants."


def kind(environment: Environment) -> tuple:
    """What two devices have to share to be alike: device, driver and torch's version, not the host."""
    return environment.device, environment.driver, environment.packages.get("torch")


def across(cell: CellResult | None, reference: CellResult | None) -> bool:
    """Whether the two columns ran on unlike devices."""
    return (
        cell is not None
        and reference is not None
        and _ran(cell, reference)
        and _kind(cell) != _kind(reference)
    )


def _ran(*cells: CellResult) -> bool:
    return all(c.environment is not None or c.kernel is not None for c in cells)


def _kind(cell: CellResult) -> tuple | None:
    """`kind` of where it ran; None: the comparison's own device."""
    return kind(cell.environment) if cell.environment else None


def mark(cell: CellResult | None, reference: CellResult | None) -> str:
    return MARK if across(cell, reference) else ""


def place(environment: Environment) -> str:
    """The device and the host it is in: “NVIDIA H200 (gpu-2)”."""
    device = environment.device or "an unknown device"
    return f"{device} ({environment.host})" if environment.host else device


def unlike(cells: Iterable[CellResult]) -> str:
    """A warning if the columns ran on unlike devices; "" otherwise."""
    measured = [c for c in cells if _ran(c)]
    if len({_kind(c) for c in measured}) < 2:
        return ""
    labels_by_place: dict[str, list[str]] = {}
    for cell in measured:
        where = place(cell.environment) if cell.environment else "this machine"
        labels_by_place.setdefault(where, []).append(cell.label)
    devices = "; ".join(f"{', '.join(names)} on {device}" for device, names in labels_by_place.items())
    return f"Compared across different devices: {devices}. {MEANING}"
