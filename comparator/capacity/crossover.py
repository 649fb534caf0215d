"""From which batch on one variant is faster than another, in words. Only differences that repeated runs carry count."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from comparator.util import formatting
from comparator.util.stats import LEAST_RUNS, differ

if TYPE_CHECKING:
    from comparator.capacity.points import Point

Runs = Mapping[int, tuple[float, ...]]  # batch → decode tok/s of each repeat


def sentences(points: Iterable[Point]) -> list[str]:
    """A sentence for each context and each variant beside the first one that was swept. Servers are compared with the first
    server: their rate includes the prompts, and another machine may have them."""
    measured: dict[tuple[int, bool], dict[str, dict[int, tuple[float, ...]]]] = {}
    for point in points:
        if point.runs:
            variants = measured.setdefault((point.context, point.served), {})
            variants.setdefault(point.variant, {})[point.batch] = point.runs
    made = []
    contexts = {context for context, _ in measured}
    for (context, _), variants in sorted(measured.items()):
        first, *others = variants
        before = f"Context {context:,}: " if len(contexts) > 1 else ""
        said = [sentence(first, variants[first], other, variants[other]) for other in others]
        made += [before + text for text in said if text]
    return made


def sentence(a: str, runs_a: Runs, b: str, runs_b: Runs) -> str:
    """Where `a` and `b` cross. Between two measured batches nothing is claimed but that they cross there. Empty where they
    share no batch."""
    batches = sorted(runs_a.keys() & runs_b.keys())
    if not batches:
        return ""
    if min(len(runs[batch]) for runs in (runs_a, runs_b) for batch in batches) < LEAST_RUNS:
        return f"{a} and {b}: at least {LEAST_RUNS} repeats are needed to tell which is faster."
    faster = {batch: _faster(a, runs_a[batch], b, runs_b[batch]) for batch in batches}
    clear = [batch for batch in batches if faster[batch]]
    if not clear:
        return f"No difference between {a} and {b} is larger than the noise of the runs, at batch {_listed(batches)}."
    changes = [
        (low, high) for low, high in zip(clear, clear[1:], strict=False) if faster[low] != faster[high]
    ]
    unclear = [batch for batch in batches if not faster[batch]]
    rest = f" At batch {_listed(unclear)} the difference is within the noise." if unclear else ""
    other = {a: b, b: a}
    if not changes:
        winner = faster[clear[0]]
        return f"{winner} is faster than {other[winner]} at batch {_listed(clear)}.{rest}"
    if len(changes) > 1:
        parts = [f"{faster[batch]} at {batch}" for batch in clear]
        return f"Of {a} and {b} which one is faster changes more than once: {formatting.join(parts)}.{rest}"
    ((low, high),) = changes
    winner = faster[high]
    return (
        f"From batch {high} on {winner} is faster than {other[winner]}, which is faster up to batch {low}: they cross between "
        f"batch {low} and {high}.{rest}"
    )


def _faster(a: str, runs_a: tuple[float, ...], b: str, runs_b: tuple[float, ...]) -> str | None:
    if not differ(runs_a, runs_b):
        return None
    return a if statistics.fmean(runs_a) > statistics.fmean(runs_b) else b


def _listed(batches: list[int]) -> str:
    return formatting.join([str(batch) for batch in batches])
