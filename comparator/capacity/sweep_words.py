"""A sweep as text: headings and cells of its table, the sentences around it, and its rows for a CSV file."""

from __future__ import annotations

from collections.abc import Iterator

from comparator.capacity.crossover import sentences
from comparator.capacity.sweep import Point, Sweep
from comparator.util import formatting
from comparator.util.stats import LEAST_RUNS

# (heading, what it is)
HEADINGS = (
    ("variant", ""),
    ("context", "tokens of each prompt"),
    ("batch", "sequences decoded at once"),
    ("tok/s", "decode rate of all sequences together, the median of the repeats"),
    ("each", "decode tok/s of one sequence"),
    ("TTFT ms", "from all prompts to the first token of every sequence"),
    ("p50 ms", "inter-token latency: the median time of a step, which gives each sequence a token"),
    ("p99 ms", "99 of 100 steps took less"),
    ("peak MB", "what the variant holds, caches and activations, at the highest"),
    ("J/token", "energy per token as the GPU reports it (NVML)"),
)
FIELDS = ("variant", "context", "batch", "path", "decode_tok_s", "decode_tok_s_per_sequence", "ttft_s", "itl_p50_s",
          "itl_p99_s", "peak_bytes", "joules_per_token", "note", "error")  # fmt: skip


def keys(point: Point) -> tuple:
    """What the cells hold as numbers, in the order of `HEADINGS`, to sort by."""
    return (
        point.variant, point.context, point.batch, point.tok_s, point.tok_s_each, point.ttft_s, point.itl_p50_s,
        point.itl_p99_s, point.peak_bytes, point.joules_per_token,
    )  # fmt: skip


def cells(point: Point) -> list[str]:
    """A point's cells, in the order of `HEADINGS`; "failed" in place of the rate where there is none."""
    return [
        point.variant,
        f"{point.context:,}",
        str(point.batch),
        "failed" if point.error else formatting.figure(point.tok_s),
        formatting.figure(point.tok_s_each),
        *(
            formatting.figure(None if s is None else s * 1e3)
            for s in (point.ttft_s, point.itl_p50_s, point.itl_p99_s)
        ),
        formatting.megabytes(point.peak_bytes, unit=False),
        formatting.figure(point.joules_per_token),
    ]


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
    if sweep.stopped:
        yield f"Stopped: {len(sweep.points)} of {sweep.total} points were measured."
    yield from _reasons(ordered(sweep))
    if sweep.options.repeats >= LEAST_RUNS and len({p.variant for p in sweep.points if p.runs}) > 1:
        yield "Noise is the spread of a point's repeats: a difference counts from four standard errors on."


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
