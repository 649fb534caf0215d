"""Timestamps → latency figures. Pure arithmetic: knows nothing of models or clocks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import replace

from comparator.types import Latency, RunFigures


def percentile(values: Sequence[float], q: float) -> float | None:
    """Percentile `q` (0..100) with linear interpolation between ranks; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def from_timestamps(start_s: float, times_s: Sequence[float], prompt_tokens: int) -> Latency:
    """One run: `start_s` when the prompt's ids were there, `times_s` when each new id reached the host.

    TTFT = first − start; inter-token latency (ITL) = differences, n − 1 values; decode rate = (n − 1) over the
    time from the first token to the last; prefill rate = prompt tokens over TTFT. Undefined figures are None.
    """
    if not times_s:
        return Latency()
    ttft = times_s[0] - start_s
    itl = tuple(b - a for a, b in zip(times_s, times_s[1:], strict=False))
    decode_s = times_s[-1] - times_s[0]
    rate = len(itl) / decode_s if itl and decode_s > 0 else None
    few = len(itl) < 2  # a percentile of one value says nothing
    return Latency(
        ttft_s=ttft,
        prefill_tok_s=prompt_tokens / ttft if ttft > 0 else None,
        decode_tok_s=rate,
        itl_s=itl,
        itl_p50_s=None if few else percentile(itl, 50),
        itl_p90_s=None if few else percentile(itl, 90),
        itl_p99_s=None if few else percentile(itl, 99),
        total_s=times_s[-1] - start_s,
        runs=(RunFigures(ttft, rate),),
    )


def median_of(runs: Sequence[Latency]) -> Latency:
    """Several runs of one column → medians, every run kept. `itl_s` and its percentiles come from the run whose
    decode rate is nearest the median, so that they are a run that happened."""
    if not runs:
        return Latency()
    rates = [r.decode_tok_s for r in runs if r.decode_tok_s is not None]
    middle = statistics.median(rates) if rates else None
    shown = min(runs, key=lambda r: abs((r.decode_tok_s or 0) - middle)) if middle is not None else runs[0]

    def median(name: str) -> float | None:
        values = [getattr(r, name) for r in runs if getattr(r, name) is not None]
        return statistics.median(values) if values else None

    return replace(
        shown,
        ttft_s=median("ttft_s"),
        prefill_tok_s=median("prefill_tok_s"),
        decode_tok_s=middle,
        total_s=median("total_s"),
        eager_decode_tok_s=median("eager_decode_tok_s"),
        runs=tuple(run for r in runs for run in r.runs),
    )


def spread(values: Sequence[float]) -> tuple[float, float] | None:
    """(lowest, highest) of several runs; None for fewer than two."""
    return (min(values), max(values)) if len(values) > 1 else None


def cannot_tell(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the difference between two columns lies within the spread of their runs.

    True when the ranges overlap, and when either has one run only (no spread, no verdict).
    """
    first, second = spread(a), spread(b)
    if first is None or second is None:
        return True
    return first[0] <= second[1] and second[0] <= first[1]
