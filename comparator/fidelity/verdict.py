"""A comparison's fidelity → what can be said of each column, and what cannot. Pure; the rule is written beside it.

Documents come from anywhere, so every figure is looked up with care: what is not
a finite number is not there.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, replace
from typing import Any

from comparator.core import devices
from comparator.core.result import CellResult, Comparison
from comparator.metrics.definitions import METRICS, run_values, stored_bytes
from comparator.metrics.layers import MOSTLY, quantized_share
from comparator.util import formatting, stats

SURE = 2.0  # standard errors that a difference must exceed
AGREEMENT = ((0.98, "nearly the same"), (0.9, "close"), (0.75, "different"), (0.0, "very different"))
CLOSE_ENOUGH = 0.9
NO_DIFFERENCE = "no difference"
BETTER = 0.95  # a perplexity below this share of the reference's is no accident of the text
EQUAL = 1e-6  # relative: probabilities nearer to each other than this are equal
POSITIONS = 8  # with the same probabilities at all of so many positions, a model does not look at its input
RULE = (
    "The verdict depends on how often both have the same most likely token (top-1 agreement): 98 % or more is nearly the "
    "same, 90 % close, 75 % different, less very different; it says “probably” where twice the standard error of the "
    "agreement reaches into another class. A difference counts when it is more than twice its standard error. "
    "Divergence that does not exceed the variant's own noise floor (the variant against itself, the text in chunks of "
    "64) by that much is rounding, not quantization. A variant cannot be better than what it was made from: where it "
    "seems to be, that is no difference, or something is broken. A variant is called faster or slower only if at least "
    f"{stats.LEAST_RUNS} undisturbed runs of each differ by more than {stats.SURE:.0f} standard errors; any other ratio of "
    "speeds is in parentheses or grey."
)


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, which is None where it cannot be known. `at_least`: the mean is a lower bound."""

    mean: float
    se: float | None = None
    at_least: bool = False

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
    speed_carried: bool  # whether the repeated runs carry the difference in speed
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
    return replace(_mean(prompt.kl), at_least=prompt.at_least) if prompt and prompt.kl else None


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


def reference_cell(comparison: Comparison) -> CellResult | None:
    """The column that the comparison names as its reference."""
    name = comparison.reference
    return comparison.cell(name.variant, name.adapter) if name else None


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
    ours, theirs = stored_bytes(cell), stored_bytes(reference) if reference else None
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
        speed_ratio=None if itself else times_as_fast(cell, reference),
        speed_carried=not itself and bool(carried(cell, reference)),
        size_ratio=ours / theirs if ours and theirs and not itself else None,
        words=words(cell, reference),
        across=devices.across(cell, reference),
    )


def _below(kl: Estimate, own_floor: Estimate) -> bool:
    """Whether the divergence does not exceed the noise floor by more than their common uncertainty."""
    spread = math.hypot(kl.se or 0.0, own_floor.se or 0.0)
    return kl.mean <= own_floor.mean + SURE * spread


# ---------------------------------------------------------------- speed


def times_as_fast(
    cell: CellResult | None, reference: CellResult | None, key: str = "decode_tok_s"
) -> float | None:
    """How many times as fast as the reference a column is, by a metric of time or rate; None where either is missing."""
    ours, theirs = (METRICS[key].get(c) if c else None for c in (cell, reference))
    return formatting.ratio(*((ours, theirs) if METRICS[key].better == "higher" else (theirs, ours)))


def carried(cell: CellResult | None, reference: CellResult | None, key: str = "decode_tok_s") -> bool | None:
    """Whether the runs of both columns carry a difference in a metric; None where runs do not keep it.

    Never for disturbed runs alone, for less than 2 %, and for what cannot be: an adapter that makes its own base faster,
    or two columns that are the same model.
    """
    if cell is None or reference is None:
        return None
    ours, theirs = run_values(cell, key), run_values(reference, key)
    if not ours or not theirs:
        return None
    times = times_as_fast(cell, reference, key)
    if disturbed(cell) or disturbed(reference) or times is None or abs(times - 1) < formatting.CLOSE:
        return False
    return not _cannot_be(cell, reference, times) and stats.differ(ours, theirs)


def disturbed(cell: CellResult) -> bool:
    """Whether something else on the machine disturbed every run of the column."""
    return bool(cell.latency.runs) and all(run.disturbed for run in cell.latency.runs)


def _cannot_be(cell: CellResult, reference: CellResult, times: float) -> bool:
    if cell.variant == reference.variant and cell.adapter and not reference.adapter:
        return times > 1  # it computes all that its base does, and the adapter besides
    kl = divergence(cell)
    return bool(
        kl
        and kl.mean == 0
        and (cell.kernel, stored_bytes(cell)) == (reference.kernel, stored_bytes(reference))
    )


def speed_words(cell: CellResult | None, reference: CellResult | None, key: str = "decode_tok_s") -> str:
    """ "1.45× as fast", "2.1× slower"; "" where the runs do not carry a difference."""
    times = times_as_fast(cell, reference, key)
    return formatting.pace(times) if times and carried(cell, reference, key) else ""


# ---------------------------------------------------------------- one phrase


def fault(cell: CellResult) -> str | None:
    """What is wrong with a column's probabilities over the reference's answer, whatever they are compared with."""
    prompt = cell.fidelity.prompt if cell.fidelity else None
    likely = [
        [token.p for token in position] for position in (prompt.top if prompt else ()) if len(position) > 1
    ]
    if not likely:
        return None
    if all(max(p) - min(p) <= EQUAL * max(p) for p in likely):
        return "every token is equally likely"
    if len(likely) >= POSITIONS and all(position == prompt.top[0] for position in prompt.top):
        return "every position has the same probabilities"
    return None


def words(cell: CellResult, reference: CellResult | None) -> str:
    """What can be said of a column's fidelity, in one phrase."""
    phrase, share = _words(cell, reference), quantized_share(cell.layers)
    measured = phrase.startswith(NO_DIFFERENCE) or any(word in phrase for _, word in AGREEMENT)
    whole = cell.model is not None and sum(r.parameters for r in cell.layers) >= 0.9 * cell.model.parameters
    if measured and whole and 0 < share < MOSTLY and cell is not reference:
        return f"{phrase} (only {formatting.percent(share)} of its weights are quantized)"
    return phrase


def _words(cell: CellResult, reference: CellResult | None) -> str:
    if cell.status == "failed":
        return "failed"
    if wrong := fault(cell):
        return f"broken: {wrong}"
    if cell is reference:
        return "reference"
    if reference is not None and fault(reference):
        return "the reference is broken"
    agrees = agreement(cell)
    if agrees is None:
        return "not measured" if cell.fidelity and cell.fidelity.refused else "–"
    prompt = cell.fidelity.prompt if cell.fidelity else None
    if prompt and not prompt.forced and prompt.first_difference is not None:
        return (
            f"the same for {formatting.plural(prompt.first_difference, 'token')} of {len(prompt.token_ids)}"
        )
    kl, own_floor = divergence(cell), floor(cell)
    if kl is not None and kl.mean <= 0 and not kl.at_least:
        return NO_DIFFERENCE
    if kl and own_floor and figure(cell, "kl", "mean") is not None and _below(kl, own_floor):
        return f"{NO_DIFFERENCE} but rounding"
    ratio = _estimate(cell, ("ppl_ratio",), ("ppl_ratio_se",))
    if ratio and ratio.mean < 1 and ratio.differs_from(1.0):
        if agrees.mean >= CLOSE_ENOUGH:
            return NO_DIFFERENCE
        if ratio.mean < BETTER:
            return "broken: it predicts the text better than its reference"
    return _class(agrees)


def _class(agrees: Estimate) -> str:
    """The class of an agreement that its mean and standard error support best."""
    if agrees.se is None:
        return f"{next(word for limit, word in AGREEMENT if agrees.mean >= limit)} (one token only)"
    limits = [math.inf, *(limit for limit, _ in AGREEMENT[:-1]), -math.inf]
    masses = [_mass(agrees, low, high) for high, low in zip(limits, limits[1:], strict=False)]
    best = max(range(len(masses)), key=masses.__getitem__)
    word, margin = AGREEMENT[best][1], SURE * agrees.se
    if limits[best + 1] <= agrees.mean - margin and agrees.mean + margin < limits[best]:
        return word
    return f"probably {word} ({agrees.mean * 100:.1f} ± {agrees.se * 100:.1f} % agree)"


def _mass(estimate: Estimate, low: float, high: float) -> float:
    """The share of a normal distribution around the estimate that lies between two limits."""
    if not estimate.se:
        return float(low <= estimate.mean < high)
    below = [
        0.5 * (1 + math.erf((limit - estimate.mean) / (estimate.se * math.sqrt(2)))) for limit in (low, high)
    ]
    return below[1] - below[0]
