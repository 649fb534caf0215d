"""Timestamps → latency figures of a run, and several runs → the figures of a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from comparator.core.result import Interference, Latency, RunFigures
from comparator.metrics.definitions import METRICS, over_repeats
from comparator.util.stats import percentile

_FIELDS = {field.name for field in fields(Latency)}


def record(latency: Latency, **values: float | None) -> Latency:
    """`latency` with values by the key of their metric: in the field of that name if there is one, else in `extra`.

    None: not measured. Raises KeyError for a key without an entry in the table of metrics.
    """
    if unknown := values.keys() - METRICS.keys():
        raise KeyError(f"not in the table of metrics: {', '.join(sorted(unknown))}")
    extra = {key: value for key, value in values.items() if key not in _FIELDS and value is not None}
    in_fields = {key: value for key, value in values.items() if key in _FIELDS}
    return replace(latency, **in_fields, extra={**latency.extra, **extra})


def from_timestamps(
    start_s: float, times_s: Sequence[float], prompt_tokens: int, interference: Interference | None = None
) -> Latency:
    """The figures of one run. Undefined ones are None.

    start_s: when the prompt's ids were ready. times_s: when each new id reached the host. Seconds of the same clock.
    """
    if not times_s:
        return Latency()
    ttft = times_s[0] - start_s
    itl = tuple(b - a for a, b in zip(times_s, times_s[1:], strict=False))
    decode_s = times_s[-1] - times_s[0]
    rate = len(itl) / decode_s if itl and decode_s > 0 else None
    spread = itl if len(itl) > 1 else ()  # a percentile of one value is meaningless
    return record(
        Latency(itl_s=itl, runs=(RunFigures(ttft, rate, interference=interference),)),
        ttft_s=ttft,
        prefill_tok_s=prompt_tokens / ttft if ttft > 0 else None,
        decode_tok_s=rate,
        itl_p50_s=percentile(spread, 50),
        itl_p90_s=percentile(spread, 90),
        itl_p99_s=percentile(spread, 99),
        total_s=times_s[-1] - start_s,
    )


def aggregate(runs: Sequence[Latency]) -> Latency:
    """Several runs of one column as one. Each metric is combined by its `over_repeats`; `runs` has every run's figures.

    Disturbed runs count only where there are no others. `itl_s` and its percentiles come from the run whose decode rate is nearest the median, so that they did occur.
    """
    if not runs:
        return Latency()
    each = tuple(replace(figures, extra=run.extra) for run in runs for figures in run.runs)
    runs = [run for run in runs if not run.disturbed] or runs
    rate = over_repeats("decode_tok_s", [run.decode_tok_s for run in runs])
    nearest = min(runs, key=lambda run: abs((run.decode_tok_s or 0) - rate)) if rate is not None else runs[0]
    combined: dict[str, float | None] = {}
    for metric in METRICS.values():
        if metric.of_latency:
            values = [_value(run, metric.key) for run in runs]
            combined[metric.key] = (
                _value(nearest, metric.key)
                if metric.over_repeats == "representative"
                else over_repeats(metric.key, values)
            )
    return record(Latency(itl_s=nearest.itl_s, runs=each), **combined)


def _value(run: Latency, key: str) -> float | None:
    return getattr(run, key) if key in _FIELDS else run.extra.get(key)
