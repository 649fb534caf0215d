"""Loss over the length of a text: divergence and agreement by how many tokens were read before.

A figure of a window's end is from tokens whose whole context the column has read itself, so what accumulates in a quantized
KV cache shows as a curve that rises.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from comparator.core.result import CellResult, Comparison
from comparator.fidelity.divergence import Positions, share, standard_error
from comparator.fidelity.verdict import reference_of

FIRST = 64  # tokens of the first bucket; each further one ends at twice as many


@dataclass(frozen=True)
class Bucket:
    """Positions after `low` to `high` tokens of context (low < context ≤ high). KL in nats; `agree`: top-1 agreement, 0..1."""

    low: int
    high: int
    tokens: int
    kl: float
    kl_se: float | None
    agree: float


def by_context(found: Positions, read: np.ndarray) -> list[dict[str, Any]]:
    """`found` by buckets of `read` (n,), the tokens that were read before each prediction; as the document holds them."""
    buckets, low, high = [], 0, FIRST
    while low < int(read.max(initial=0)):
        inside = (read > low) & (read <= high)
        if inside.any():
            kl = found.kl[inside]
            buckets.append({
                "from": low + 1, "to": min(high, int(read.max())), "tokens": int(inside.sum()),
                "kl": float(kl.mean()), "kl_se": standard_error(kl), "top1": share(found.agree[inside])["mean"],
            })  # fmt: skip
        low, high = high, 2 * high
    return buckets


def buckets(cell: CellResult) -> list[Bucket]:
    """What the column's document says of it; [] where it was not measured. A document may come from anybody."""
    text: Any = cell.fidelity.text if cell.fidelity else None
    entries = text.get("by_context") if isinstance(text, dict) else None
    made = []
    for entry in entries[:64] if isinstance(entries, list) else ():
        values = [
            entry.get(name) if isinstance(entry, dict) else None
            for name in ("from", "to", "tokens", "kl", "top1")
        ]
        if not all(_is_number(value) for value in values):
            return []
        low, high, tokens, kl, agree = values
        se = entry.get("kl_se")
        made.append(
            Bucket(
                int(low) - 1, int(high), int(tokens), float(kl), se if _is_number(se) else None, float(agree)
            )
        )
    return made


def measured(comparison: Comparison) -> list[tuple[CellResult, list[Bucket]]]:
    """The columns with more than one bucket, the reference left out."""
    cells = [cell for cell in comparison.cells if cell is not reference_of(comparison, cell)]
    return [(cell, found) for cell in cells if len(found := buckets(cell)) > 1]


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
        and abs(value) < 1e15
    )
