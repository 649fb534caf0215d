"""Columns that ran on unlike devices: whether two did, how that is marked, and how it is said. Pure.

Where all columns ran in one place their environment is the comparison's, and nothing here says anything.
"""

from __future__ import annotations

from collections.abc import Iterable

from comparator.types import CellResult, Environment

MARK = "≠"  # beside a ratio: the two were measured on unlike devices
MEANING = f"{MARK} marks a ratio between unlike devices: it compares them as much as the variants."


def kind(environment: Environment) -> tuple:
    """What makes two devices unlike: another host alone does not."""
    return environment.device, environment.driver, environment.packages.get("torch")


def across(cell: CellResult | None, reference: CellResult | None) -> bool:
    """Whether a ratio between the two is one between unlike devices."""
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
    """A sentence for the top of a comparison whose columns ran on unlike devices; "" otherwise."""
    placed = [c for c in cells if c.environment is not None]
    if len({kind(c.environment) for c in placed}) < 2:
        return ""
    where: dict[str, list[str]] = {}
    for cell in placed:
        where.setdefault(place(cell.environment), []).append(cell.label)
    said = "; ".join(f"{', '.join(labels)} on {device}" for device, labels in where.items())
    return f"Compared across unlike devices: {said}. {MEANING}"
