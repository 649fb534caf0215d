"""What a prompt set says of each column: checks passed, distance from the reference, and answers that flipped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from comparator.core.prompt_set import SetAnswer, SetPrompt
from comparator.core.result import Comparison
from comparator.util import stats


@dataclass(frozen=True)
class ColumnSummary:
    """`passed` of `checked`, with the 95 % interval of the share. `worse` and `better`: right → wrong and back, against the
    reference, and the exact p value of McNemar's test; None for the reference itself."""

    label: str
    answered: int
    passed: int
    checked: int
    interval: tuple[float, float] | None
    kl: float | None
    at_least: bool
    agreement: float | None  # over all tokens that were compared
    worse: int | None = None
    better: int | None = None
    p: float | None = None


def summaries(comparison: Comparison) -> list[ColumnSummary]:
    """One per column, in their order; empty without a set."""
    result, reference = comparison.prompt_set, _reference_index(comparison)
    if result is None:
        return []
    theirs = result.answers[reference] if reference is not None else ()
    columns = []
    for number, cell in enumerate(comparison.cells):
        answers = [a for a in result.answers[number] if a is not None and a.error is None]
        checked = [a for a in answers if a.passed is not None]
        passed = sum(bool(a.passed) for a in checked)
        kls = [a.kl for a in answers if a.kl is not None]
        compared = [a for a in answers if a.agreement is not None]
        tokens = sum(a.compared for a in compared)
        flips = (None, None, None)
        if theirs and number != reference:
            pairs = [
                (o.passed, t.passed) for o, t in zip(result.answers[number], theirs, strict=True) if o and t
            ]
            worse, better = pairs.count((False, True)), pairs.count((True, False))
            flips = (worse, better, stats.mcnemar(worse, better))
        columns.append(
            ColumnSummary(
                cell.label, len(answers), passed, len(checked),
                stats.wilson(passed, len(checked)) if checked else None,
                fmean(kls) if kls else None, any(a.at_least for a in answers),
                sum(a.agreement * a.compared for a in compared) / tokens if tokens else None,
                *flips,
            )
        )  # fmt: skip
    return columns


def rows(comparison: Comparison) -> Iterator[tuple[SetPrompt, list[SetAnswer | None]]]:
    """(prompt, its answers in the order of the columns), where it matters first: checks that flip, then the largest KL."""
    result, reference = comparison.prompt_set, _reference_index(comparison)
    if result is None:
        return iter(())
    table = [(p, [column[n] for column in result.answers]) for n, p in enumerate(result.prompts)]

    def matters(row: tuple[SetPrompt, list[SetAnswer | None]]) -> tuple[bool, float]:
        passed = [a.passed if a else None for a in row[1]]
        base = passed[reference] if reference is not None else None
        flips = base is not None and any(p is not None and p != base for p in passed)
        return not flips, -max((a.kl or 0.0 for a in row[1] if a), default=0.0)

    return iter(sorted(table, key=matters))


def _reference_index(comparison: Comparison) -> int | None:
    name = comparison.reference
    return next(
        (
            n
            for n, c in enumerate(comparison.cells)
            if name and (c.variant, c.adapter) == (name.variant, name.adapter)
        ),
        None,
    )
