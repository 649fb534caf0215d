"""Which column to take, from what was measured: the smallest, the fastest, the most faithful, and one for balance.

A choice is made only where the measurement carries it; otherwise it says what to measure next. Columns are compared with
the reference and only where they carry the same adapter as it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from comparator.core.result import CellResult
from comparator.fidelity import verdict
from comparator.fidelity.verdict import Estimate
from comparator.metrics.definitions import METRICS, run_values
from comparator.reporting.prompt_set import ColumnSummary
from comparator.util import formatting, stats

Sets = Mapping[str, ColumnSummary]  # by column

ALIKE = 0.05  # sizes within this share of each other count as equal
FEW = 200  # positions: a single answer; the standard error of an agreement of 90 % is then 2 points or more
SIGNIFICANT = 0.05  # p of the flips below which a column is not recommended for balance
RULE = (
    f"Balanced is the smallest variant whose most likely token is the reference's at {verdict.CLOSE_ENOUGH * 100:.0f} % "
    f"of the positions or more. Among variants within {ALIKE * 100:.0f} % of its size it is the most faithful one, never "
    "one whose "
    f"answers became wrong more often than chance explains (checks of a prompt set, p < {SIGNIFICANT:g}). A fastest variant is named "
    f"only if at least {stats.LEAST_RUNS} undisturbed runs support it. Most faithful is the lowest KL divergence."
)


@dataclass(frozen=True)
class Choice:
    """The column for one goal, and what it costs and gains, in words. `cell` None: the measurement does not carry one."""

    goal: str
    cell: CellResult | None
    words: str
    metric: str = ""  # the figure that decided; "" where it is none of the summary's
    alike: tuple[str, ...] = ()  # labels of the columns that are not measurably different from it


@dataclass(frozen=True)
class Recommendation:
    """`sentence`: the answer. `choices`: a column for each goal. `next_steps`: what to measure for a better answer."""

    sentence: str
    choices: tuple[Choice, ...]
    next_steps: tuple[str, ...]

    @property
    def lines(self) -> list[str]:
        """What follows the sentence in plain text: "Smallest: nf4, 58 % less memory"."""
        chosen = [
            f"{c.goal.capitalize()}: {c.cell.label}, {c.words}"
            if c.cell
            else f"{c.goal.capitalize()}: {c.words}"
            for c in self.choices
        ]
        return [*chosen, *self.next_steps]

    @property
    def best(self) -> dict[str, frozenset[str]]:
        """Metric → labels of the columns that no other is measurably better than in it."""
        return {c.metric: frozenset({c.cell.label, *c.alike}) for c in self.choices if c.cell and c.metric}


def recommend(
    cells: Sequence[CellResult], reference: CellResult | None, summaries: Sequence[ColumnSummary] = ()
) -> Recommendation | None:
    """None where there is nothing to choose from: less than two columns that answered.

    cells: the columns of a comparison that has ended. reference: what they are measured against. summaries: what a prompt
    set says of them, where one was run.
    """
    if reference is None or reference.status != "ok":
        return None
    others = [c for c in cells if c.status == "ok" and c.adapter == reference.adapter and c is not reference]
    broken = [c for c in others if _is_broken(c, reference)]
    usable = [c for c in others if c not in broken]
    if not usable:
        return None
    sets = {s.label: s for s in summaries}
    choices = [_smallest(usable, reference), _fastest(usable, reference), _most_faithful(usable, reference)]
    choices += _most_right(usable, reference, sets)
    sentence = _balanced(usable, reference, sets)
    if broken:
        sentence += f" {formatting.join([c.label for c in broken])} cannot be used: see the verdict."
    return Recommendation(sentence, tuple(choices), tuple(_next_steps(usable, reference, sets)))


def _is_broken(cell: CellResult, reference: CellResult) -> bool:
    return verdict.words(cell, reference).startswith("broken")


def _size(cell: CellResult) -> float | None:
    return METRICS["resident_bytes"].get(cell)


def _less(cell: CellResult, reference: CellResult) -> str:
    return formatting.amount(formatting.ratio(_size(cell), _size(reference)), "memory")


def _pace(cell: CellResult, reference: CellResult) -> str:
    """ "1.45× as fast", or that the runs show no difference; "" where too few runs can tell."""
    if words := verdict.speed_words(cell, reference):
        return words
    enough = all(len(run_values(c, "decode_tok_s")) >= stats.LEAST_RUNS for c in (cell, reference))
    return "no measurable difference in speed" if enough and not _any_disturbed(cell, reference) else ""


def _any_disturbed(*cells: CellResult) -> bool:
    return any(map(verdict.disturbed, cells))


def _agrees(cell: CellResult, reference: CellResult, sets: Sets) -> str:
    """ "the same most likely token as bf16 at 91.3 ± 0.6 % of 2,048 positions"."""
    agreed, positions = _agreement(cell, sets)
    if agreed is None:
        return ""
    error = "" if agreed.se is None else f" ± {agreed.se * 100:.1f}"
    return (
        f"the same most likely token as {reference.label} at {agreed.mean * 100:.1f}{error} % of "
        f"{formatting.plural(positions, 'position')}"
    )


def _agreement(cell: CellResult, sets: Sets) -> tuple[Estimate | None, int]:
    """(how often the column's most likely token is the reference's, at how many positions): on a text, else over a prompt
    set, else in one answer."""
    summary = sets.get(cell.label)
    on_text = verdict.figure(cell, "tokens") is not None
    if on_text or summary is None or summary.agreement is None:
        return verdict.agreement(cell), positions_of(cell)
    return Estimate(summary.agreement.mean, summary.agreement.se), summary.compared


def _flips(cell: CellResult, sets: Sets) -> str:
    """ "3 of 40 checks flipped (2 to wrong, 1 to right; p = 1)"; "" where no check can flip."""
    s = sets.get(cell.label)
    if s is None or s.worse is None or s.better is None or s.p is None:
        return ""
    count = s.worse + s.better
    how = f" ({s.worse} to wrong, {s.better} to right; p = {s.p:.2g})" if count else ""
    return f"{count} of {formatting.plural(s.checked, 'check')} flipped{how}"


def _is_harmed(cell: CellResult, sets: Sets) -> bool:
    """Whether its answers became wrong more often than chance explains."""
    s = sets.get(cell.label)
    return s is not None and s.p is not None and s.p < SIGNIFICANT and (s.worse or 0) > (s.better or 0)


def positions_of(cell: CellResult) -> int:
    """The number of tokens at which a column was compared with its reference."""
    if (tokens := verdict.figure(cell, "tokens")) is not None and verdict.figure(
        cell, "kl", "mean"
    ) is not None:
        return int(tokens)
    prompt = cell.fidelity.prompt if cell.fidelity else None
    return max(len(prompt.kl), len(prompt.rank)) if prompt else 0


# ---------------------------------------------------------------- a column for each goal


def _smallest(usable: list[CellResult], reference: CellResult) -> Choice:
    known = [c for c in (*usable, reference) if _size(c) is not None]
    if not known:
        return Choice("smallest", None, "memory was not measured")
    cell = min(known, key=lambda c: _size(c) or math.inf)
    if cell is reference:
        return Choice("smallest", cell, "nothing takes less memory", "resident_bytes")
    return Choice("smallest", cell, _less(cell, reference), "resident_bytes")


def _fastest(usable: list[CellResult], reference: CellResult) -> Choice:
    """The column that is faster than the reference by the most; the reference where all others are slower."""
    carried = [c for c in usable if verdict.carried(c, reference)]
    faster = {c.label: verdict.times_as_fast(c, reference) or 0.0 for c in carried}
    ahead = [c for c in carried if faster[c.label] > 1]
    if ahead:
        cell = max(ahead, key=lambda c: faster[c.label])
        alike = [c.label for c in ahead if c is not cell and not verdict.carried(c, cell)]
        also = f" (no measurable difference to {formatting.join(alike)})" if alike else ""
        return Choice(
            "fastest", cell, formatting.pace(faster[cell.label]) + also, "decode_tok_s", tuple(alike)
        )
    if len(carried) == len(usable):
        return Choice("fastest", reference, "all others are slower", "decode_tok_s")
    if all(_pace(c, reference) for c in usable):
        return Choice("fastest", None, "no variant is measurably faster than the reference")
    return Choice("fastest", None, "too few undisturbed runs to tell")


def _most_faithful(usable: list[CellResult], reference: CellResult) -> Choice:
    known = [(c, kl) for c in usable if (kl := verdict.divergence(c)) is not None and not kl.at_least]
    if not known:
        bounds = any(verdict.divergence(c) for c in usable)
        return Choice(
            "most faithful", None, "only lower bounds are known" if bounds else "fidelity was not measured"
        )
    cell, best = min(known, key=lambda pair: pair[1].mean)
    alike = [c.label for c, kl in known if c is not cell and not _further(kl, best)]
    also = f" (no measurable difference to {formatting.join(alike)})" if alike else ""
    words = f"KL divergence {formatting.small(best.mean, 2)} nats{also}"
    # A divergence over a text decides before that of one answer, which is what the summary shows.
    shown = verdict.figure(cell, "kl", "mean") is None
    return Choice("most faithful", cell, words, "prompt_kl_mean" if shown else "", tuple(alike))


def _further(one: Estimate, other: Estimate) -> bool:
    """Whether a divergence is larger than another by more than twice their common standard error."""
    if one.se is None or other.se is None:
        return False
    return one.mean - other.mean > verdict.SURE * math.hypot(one.se, other.se)


def _most_right(usable: list[CellResult], reference: CellResult, sets: Sets) -> list[Choice]:
    """The column that passed the most checks of a prompt set; none without checks."""
    known = [c for c in (*usable, reference) if c.label in sets and sets[c.label].checked]
    if len(known) < 2:
        return []
    cell = max(known, key=lambda c: sets[c.label].passed / sets[c.label].checked)
    best = sets[cell.label]
    alike = [c.label for c in known if c is not cell and not _apart(best, sets[c.label])]
    also = f" (the intervals of {formatting.join(alike)} overlap)" if alike else ""
    return [Choice("most checks passed", cell, f"{best.passed} of {best.checked}{also}")]


def _apart(one: ColumnSummary, other: ColumnSummary) -> bool:
    return one.interval is not None and other.interval is not None and one.interval[0] > other.interval[1]


def _balanced(usable: list[CellResult], reference: CellResult, sets: Sets) -> str:
    """The answer in one or two sentences."""
    smaller = [
        c for c in usable
        if (share := formatting.ratio(_size(c), _size(reference))) is not None and share < 1 - formatting.CLOSE
    ]  # fmt: skip
    if not smaller:
        return f"No variant takes less memory than {reference.label}."
    shares = {c.label: agreed.mean for c in smaller if (agreed := _agreement(c, sets)[0]) is not None}
    judged = [c for c in smaller if c.label in shares]
    if not judged:
        cell = min(smaller, key=lambda c: _size(c) or math.inf)
        return f"{cell.label} is the smallest: {_gains(cell, reference)}. Quality was not measured."
    near = [c for c in judged if shares[c.label] >= verdict.CLOSE_ENOUGH and not _is_harmed(c, sets)]
    if not near:
        cell = max(judged, key=lambda c: shares[c.label])
        return (
            f"Keep {reference.label} unless memory matters most: {cell.label} is the closest, with "
            f"{_costs(cell, reference, sets)}, and {_gains(cell, reference)}."
        )
    least = min(_size(c) or math.inf for c in near)
    alike = [c for c in near if (_size(c) or math.inf) <= least * (1 + ALIKE)]
    cell = max(alike, key=lambda c: shares[c.label])
    agreed, positions = _agreement(cell, sets)
    sure = (
        agreed is not None
        and agreed.se is not None
        and agreed.mean - verdict.SURE * agreed.se >= verdict.CLOSE_ENOUGH
        and positions >= FEW
    )
    start = f"Take {cell.label}" if sure else f"Probably {cell.label}"
    return f"{start}: {_gains(cell, reference)}, {_costs(cell, reference, sets)}."


def _costs(cell: CellResult, reference: CellResult, sets: Sets) -> str:
    return ", ".join(filter(None, (_agrees(cell, reference, sets), _flips(cell, sets))))


def _gains(cell: CellResult, reference: CellResult) -> str:
    return ", ".join(
        filter(None, (f"{_less(cell, reference)} than {reference.label}", _pace(cell, reference)))
    )


def _next_steps(usable: list[CellResult], reference: CellResult, sets: Sets) -> list[str]:
    steps = []
    counts = {len(run_values(c, "decode_tok_s")) for c in (*usable, reference)}
    if counts and min(counts) < stats.LEAST_RUNS:
        steps.append(f"Speed: repeat the run at least {stats.LEAST_RUNS} times (repeats).")
    elif _any_disturbed(*usable, reference):
        steps.append("Speed: run again while nothing else uses the machine.")
    positions = max(_agreement(c, sets)[1] for c in usable)
    if not positions:
        steps.append("Quality: measure fidelity.")
    elif positions < FEW:
        steps.append(
            f"Quality: score a text. One answer of {formatting.plural(positions, 'token')} says little."
        )
    return steps
