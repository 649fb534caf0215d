"""A sweep as text: headings and cells of its table, the sentences around it, and its rows for a CSV file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from comparator.capacity.crossover import sentences
from comparator.capacity.points import Point
from comparator.capacity.sweep import Sweep
from comparator.util import formatting
from comparator.util.stats import LEAST_RUNS


@dataclass(frozen=True)
class Column:
    """A column of the table. why: what it is. value: the number it sorts by; text: as written."""

    heading: str
    why: str
    value: Callable[[Point], Any]
    text: Callable[[Any], str] = formatting.figure

    def cell(self, point: Point) -> str:
        return self.text(self.value(point))


def _ms(value: float | None) -> str:
    return formatting.figure(None if value is None else value * 1e3)


COLUMNS = (
    Column("variant", "", lambda p: p.variant, str),
    Column("context", "tokens of each prompt", lambda p: p.context, formatting.count),
    Column("batch", "sequences decoded at once; for a server, concurrent requests", lambda p: p.batch, str),
    Column("tok/s", "decode rate of all sequences together, the median of the repeats; for a server over the whole run, prompts included", lambda p: "failed" if p.error else p.tok_s, lambda v: v if isinstance(v, str) else formatting.figure(v)),
    Column("each", "decode tok/s of one sequence", lambda p: p.tok_s_each),
    Column("TTFT ms", "from all prompts to the first token of every sequence; for a server the median of its requests",
           lambda p: p.ttft_s, _ms),
    Column("p50 ms", "inter-token latency: the median time of a step, which generates one token for each sequence",
           lambda p: p.itl_p50_s, _ms),
    Column("p99 ms", "99 % of the steps took less", lambda p: p.itl_p99_s, _ms),
    Column("good %", "goodput: the share of requests that meet the limits", lambda p: p.good_share, lambda v: formatting.figure(
           None if v is None else v * 100)),
    Column("good/s", "goodput: requests per second that meet the limits", lambda p: p.good_per_s),
    Column("peak MB", "peak memory: the variant itself, caches and activations", lambda p: p.peak_bytes,
           lambda v: formatting.megabytes(v, unit=False)),
    Column("J/token", "energy per token as the GPU reports it (NVML)", lambda p: p.joules_per_token),
)  # fmt: skip
MEETING = 0.95  # of requests meet the limits: what a batch has to reach to count as one that keeps them
FIELDS = ("variant", "context", "batch", "path", "decode_tok_s", "decode_tok_s_per_sequence", "ttft_s", "itl_p50_s",
          "itl_p99_s", "good_share", "good_per_s", "peak_bytes", "joules_per_token", "note", "error")  # fmt: skip


def columns(sweep: Sweep) -> list[Column]:
    """Those of which any point has a value."""
    return [column for column in COLUMNS if any(column.value(point) is not None for point in sweep.points)]


def ordered(sweep: Sweep) -> list[Point]:
    """Points by variant in the order of the request, then context and batch."""
    variants = list(dict.fromkeys(point.variant for point in sweep.points))
    return sorted(sweep.points, key=lambda p: (variants.index(p.variant), p.context, p.batch))


def intro(sweep: Sweep) -> str:
    options, device = sweep.options, sweep.environment.device
    repeats = formatting.plural(options.repeats, "run")
    return (
        f"{sweep.model} on {device}: {options.new_tokens} new tokens per sequence, median of {repeats}, "
        f"in {formatting.duration(sweep.took_s)}."
    )


def remarks(sweep: Sweep) -> Iterator[str]:
    """The crossover first, then what failed and what the figures are not."""
    yield from sentences(sweep.points)
    yield from _within_limits(sweep)
    if sweep.stopped:
        yield f"Stopped: {len(sweep.points)} of {sweep.total} points were measured."
    yield from _reasons(ordered(sweep))
    if sweep.options.repeats >= LEAST_RUNS and len({p.variant for p in sweep.points if p.runs}) > 1:
        yield "A difference counts only from four standard errors on, estimated from the spread of a point's repeats."


def _within_limits(sweep: Sweep) -> Iterator[str]:
    """Up to which batch the requests meet the limits, for each variant and context."""
    lines: dict[tuple[str, int], dict[int, float]] = {}
    for point in ordered(sweep):
        if point.good_share is not None:
            lines.setdefault((point.variant, point.context), {})[point.batch] = point.good_share
    several = len({context for _, context in lines}) > 1
    for (variant, context), shares in lines.items():
        before = f"Context {context:,}: " if several else ""
        good = list(itertools.takewhile(lambda batch: shares[batch] >= MEETING, shares))  # noqa: B023 - used at once
        over = next((batch for batch in shares if batch not in good), None)
        start = f"up to batch {good[-1]}" if good else "at no batch"
        end = f"; at batch {over}, {formatting.percent(shares[over])} of them do" if over is not None else ""
        yield f"{before}{variant}: at least {MEETING * 100:.0f} % of the requests meet {sweep.options.limits} {start}{end}."


def _reasons(points: list[Point]) -> Iterator[str]:
    """Why points have no figures, and their notes: a line for each reason and context, which names variants and batches."""
    places: dict[tuple[str, int], dict[str, list[str]]] = {}
    for point in points:
        if reason := point.error or point.note:
            at = places.setdefault((reason, point.context), {})
            at.setdefault(point.variant, []).append(str(point.batch))
    for (reason, context), at in places.items():
        same: dict[tuple[str, ...], list[str]] = {}
        for variant, batches in at.items():
            same.setdefault(tuple(batches), []).append(variant)
        where = [
            f"{formatting.join(names)} at batch {formatting.join(batches)}" for batches, names in same.items()
        ]
        yield f"Context {context:,}, {formatting.join(where)}: {reason}"


def csv_rows(sweep: Sweep) -> tuple[tuple[str, ...], list[tuple]]:
    """(header, a row for each point)."""
    return FIELDS, [tuple(point.to_dict()[name] for name in FIELDS) for point in ordered(sweep)]
