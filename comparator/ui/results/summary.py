"""Which column to take, and the table of all: size, speed and fidelity on one line, each beside the reference's."""

from __future__ import annotations

from comparator.core import devices
from comparator.core.result import CellResult
from comparator.fidelity import verdict
from comparator.metrics.definitions import LEGEND, METRICS, Metric, shown
from comparator.reporting import answer, prompt_set, recommendation
from comparator.ui.markup import render as render_template
from comparator.ui.metric_table import heading
from comparator.ui.page import Page, html
from comparator.ui.results.cards import differing
from comparator.ui.view_state import Column, Live
from comparator.util import formatting
from comparator.util.stats import LEAST_RUNS

BARS = ("decode_tok_s", "resident_bytes")  # drawn as bars, the largest value as wide as its cell


def build(page: Page) -> None:
    page.summary = html(elem_id="summary")


def render(live: Live) -> str:
    """The table as HTML; what has not been measured yet is a dash."""
    if not live.columns:
        return ""
    metrics = shown("summary")
    largest = {
        key: max((_value(c.result, METRICS[key]) or 0 for c in live.columns), default=0) for key in BARS
    }
    drawn, recommended = answer_to(live)
    best = recommended.best if recommended else {}
    rows = [
        {
            "colour": live.colours[column.variant],
            "label": column.label,
            "cells": [_cell(live, column, metric, largest, best) for metric in metrics],
            "verdict": in_words(live, column),
        }
        for column in live.columns
    ]
    head = [("Variant", ""), *map(heading, metrics), ("Verdict", "against the reference")]
    unlike = devices.unlike(c.result for c in live.columns if c.result)
    table = render_template("summary.html", head=head, rows=rows, unlike=unlike, foot=footnote(live))
    return drawn + table


def answer_to(live: Live) -> tuple[str, recommendation.Recommendation | None]:
    """(which column to take, as HTML above the table; the recommendation). Nothing until everything has been measured: until
    then the answers stay in view."""
    if not all(column.settled for column in live.columns):
        return "", None
    reference = live.reference_column
    results = [column.result for column in live.columns if column.result]
    summaries = prompt_set.summaries(live.comparison) if live.comparison else ()
    theirs = reference.result if reference else None
    recommended = recommendation.recommend(results, theirs, summaries)
    return answer.draw(recommended, results, theirs), recommended


def footnote(live: Live) -> str:
    """The units, what × means, and how far a difference in speed can be trusted."""
    name = live.reference_column
    text = f"MB is 10⁶ bytes; {LEGEND}; bold: no other variant is measurably better. "
    if name is not None and len(live.columns) > 1:
        text += f"× is the ratio to {name.label}, the reference. "
    runs = max((len(c.result.latency.runs) for c in live.columns if c.result), default=1)
    if runs >= LEAST_RUNS:
        return (
            text
            + f"Medians of up to {runs} runs; a variant is called faster or slower only if they support it."
        )
    return (
        text
        + f"Speeds are called faster or slower from {LEAST_RUNS} runs on: see Repeats under More settings."
    )


def _cell(
    live: Live, column: Column, metric: Metric, largest: dict[str, float], best: dict[str, frozenset[str]]
) -> dict:
    reference = live.against(column)
    theirs = reference.result if reference else None
    value = _value(column.result, metric)
    share = formatting.ratio(value, _value(theirs, metric)) if metric.ratio else None
    return {
        "text": metric.format(column.result) if column.result else formatting.NONE,
        "times": formatting.times(share, devices.mark(column.result, theirs)),
        "key": value,
        "best": column.label in best.get(metric.key, ()),
        "percent": 100 * (value or 0) / (largest[metric.key] or 1) if metric.key in BARS else None,
    }


def _value(result: CellResult | None, metric: Metric) -> float | None:
    return metric.get(result) if result else None


def in_words(live: Live, column: Column) -> str:
    """The verdict on a column: "58 % less memory, 1.45× as fast, close: 12 of 40 words differ"."""
    if column.state == "failed":
        return "failed"
    if not column.answered or not column.result:
        return column.state
    reference = live.against(column)
    theirs = reference.result if reference else column.result
    if theirs is None:  # the reference comes later in the run
        return column.state
    quality = verdict.words(column.result, theirs)
    if live.is_reference(column) or quality.startswith("broken"):
        return quality
    share = formatting.ratio(
        _value(column.result, METRICS["resident_bytes"]), _value(theirs, METRICS["resident_bytes"])
    )
    speed = verdict.speed_words(column.result, theirs)
    if any(map(verdict.disturbed, (column.result, theirs))):
        speed = "speed disturbed"
    if (
        quality in ("–", "not measured") or column.result.variant == theirs.variant
    ):  # an adapter on the same base
        quality = "" if column.settled else "quality pending"
    answer = ": ".join(filter(None, (quality, differing(live, column))))
    return ", ".join(filter(None, (formatting.amount(share, "memory"), speed, answer))) or column.state
