"""A comparison's fidelity → what can be said of each column, and what cannot. Pure; the rule is written beside it.

Knows nothing of pages or plots. Documents come from anywhere, so every figure is looked up with care: what is not
a finite number is not there.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from comparator import devices
from comparator.metrics.latency import cannot_tell
from comparator.types import CellResult, Comparison

SURE = 2.0  # standard errors that a difference must exceed
AGREEMENT = ((0.98, "nearly the same"), (0.9, "close"), (0.75, "different"), (0.0, "very different"))
RULE = (
    "A difference counts when it is more than twice its standard error, a difference in speed when the ranges of "
    "repeated runs do not overlap; otherwise the table says “can't tell”. Divergence that does not exceed the column's "
    "own noise floor (the column against itself, the text fed in chunks of 64) by that much is rounding, not "
    "quantization. The rest goes by how often both put the same token first: from 98 % on nearly the same, from 90 % "
    "close, from 75 % different, below that very different."
)


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, which is None where it cannot be known."""

    mean: float
    se: float | None = None

    def differs_from(self, other: float) -> bool | None:
        """Whether it is further from `other` than 2 standard errors; None where that cannot be known."""
        return None if self.se is None else abs(self.mean - other) > SURE * self.se


@dataclass(frozen=True)
class Verdict:
    """One line of the verdict table. Undefined is None."""

    cell: CellResult
    is_reference: bool
    kl: Estimate | None
    floor: Estimate | None
    below_floor: bool | None
    ppl: Estimate | None
    ppl_ratio: Estimate | None
    agreement: Estimate | None
    speed_ratio: float | None
    speed_told: bool  # whether the difference in speed exceeds the runs' spread
    size_ratio: float | None
    words: str
    across: bool = False  # the two ran on unlike devices


def figure(cell: CellResult, *path: str) -> float | None:
    """A figure of `fidelity.text`; None where it is not a finite number."""
    value: Any = cell.fidelity.text if cell.fidelity else None
    for part in path:
        value = value.get(part) if isinstance(value, dict) else None
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def _estimate(cell: CellResult, mean: tuple[str, ...], se: tuple[str, ...]) -> Estimate | None:
    value = figure(cell, *mean)
    return None if value is None else Estimate(value, figure(cell, *se))


def divergence(cell: CellResult) -> Estimate | None:
    """Mean KL divergence: over the longer text where there is one, else over the reference's answer."""
    return _estimate(cell, ("kl", "mean"), ("kl", "se")) or prompt_divergence(cell)


def prompt_divergence(cell: CellResult) -> Estimate | None:
    prompt = cell.fidelity.prompt if cell.fidelity else None
    return _mean(prompt.kl) if prompt and prompt.kl else None


def agreement(cell: CellResult) -> Estimate | None:
    """How often both put the same token first: on the text, else how often the column's first is the answer's token."""
    found = _estimate(cell, ("top1", "mean"), ("top1", "se"))
    prompt = cell.fidelity.prompt if cell.fidelity else None
    if found or not prompt or not prompt.rank:
        return found
    share, count = statistics.fmean(r == 0 for r in prompt.rank), len(prompt.rank)
    return Estimate(share, math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else None)


def floor(cell: CellResult) -> Estimate | None:
    return _estimate(cell, ("floor", "kl", "mean"), ("floor", "kl", "se"))


def _mean(values: tuple[float, ...]) -> Estimate:
    count = len(values)
    return Estimate(
        statistics.fmean(values), statistics.stdev(values) / math.sqrt(count) if count > 1 else None
    )


def on_text(comparison: Comparison) -> bool:
    """Whether any column was scored on a longer text."""
    return any(figure(cell, "kl", "mean") is not None for cell in comparison.cells)


def size(cell: CellResult) -> int | None:
    """Bytes of weights and quant state: the same wherever it runs, unlike what a device holds beside them."""
    memory = cell.memory
    return None if memory.weight_bytes is None else memory.weight_bytes + (memory.quant_state_bytes or 0)


def bits_per_weight(cell: CellResult) -> float | None:
    total, parameters = size(cell), sum(r.parameters for r in cell.layers if r.tied_to is None)
    return 8 * total / parameters if total is not None and parameters else None


def reference_of(comparison: Comparison, cell: CellResult) -> CellResult | None:
    """What `cell` was measured against: the reference variant with the same adapter, else the reference."""
    name = comparison.reference
    if name is None:
        return None
    return comparison.cell(name.variant, cell.adapter) or comparison.cell(name.variant, name.adapter)


def verdicts(comparison: Comparison) -> list[Verdict]:
    """One per column, in their order."""
    return [_verdict(cell, reference_of(comparison, cell)) for cell in comparison.cells]


def _verdict(cell: CellResult, reference: CellResult | None) -> Verdict:
    itself = cell is reference
    kl, own_floor = divergence(cell), floor(cell)
    on_the_text = figure(cell, "kl", "mean") is not None
    below = _below(kl, own_floor) if kl and own_floor and on_the_text and not itself else None
    told, ratio = _speed(cell, None if itself else reference)
    ours, theirs = size(cell), size(reference) if reference else None
    agrees = agreement(cell)
    return Verdict(
        cell=cell,
        is_reference=itself,
        kl=None if itself else kl,
        floor=own_floor,
        below_floor=below,
        ppl=_estimate(cell, ("ppl",), ("ppl_se",)),
        ppl_ratio=None if itself else _estimate(cell, ("ppl_ratio",), ("ppl_ratio_se",)),
        agreement=None if itself else agrees,
        speed_ratio=ratio,
        speed_told=told,
        size_ratio=ours / theirs if ours and theirs and not itself else None,
        words=_words(cell, itself, below, agrees),
        across=devices.across(cell, reference),
    )


def _below(kl: Estimate, own_floor: Estimate) -> bool:
    """Whether the divergence does not exceed the noise floor by more than their common uncertainty."""
    spread = math.hypot(kl.se or 0.0, own_floor.se or 0.0)
    return kl.mean <= own_floor.mean + SURE * spread


def _speed(cell: CellResult, reference: CellResult | None) -> tuple[bool, float | None]:
    ours = cell.latency.decode_tok_s
    theirs = reference.latency.decode_tok_s if reference else None
    if not ours or not theirs:
        return False, None
    mine, its = (
        [r.decode_tok_s for r in c.latency.runs if r.decode_tok_s is not None] for c in (cell, reference)
    )
    return not cannot_tell(mine, its), ours / theirs


def _words(cell: CellResult, itself: bool, below: bool | None, agrees: Estimate | None) -> str:
    if cell.status == "failed":
        return "failed"
    if itself:
        return "reference"
    if cell.fidelity and cell.fidelity.refused and agrees is None:
        return "not measured"
    if agrees is None:
        return "–"
    if below:
        return "the same, but for rounding"
    bands = [(limit, word) for limit, word in AGREEMENT]
    word = next(w for limit, w in bands if agrees.mean >= limit)
    if agrees.se is None:
        return f"{word} (one token only)"
    margin = SURE * agrees.se
    low = next(w for limit, w in bands if agrees.mean - margin >= limit or limit == 0.0)
    high = next(w for limit, w in bands if agrees.mean + margin >= limit)
    return word if low == high else f"{high} to {low}: can't tell"
