"""A comparison's metrics as a table of the page: a row per column, each value beside its ratio to the reference."""

from __future__ import annotations

from collections.abc import Callable

from comparator.core import devices
from comparator.core.result import CellResult, Comparison
from comparator.metrics.definitions import Metric, Place, present, run_values
from comparator.reporting.plots import style
from comparator.reporting.ratios import ratio, reference_of
from comparator.ui.markup import render
from comparator.util import formatting


def heading(metric: Metric) -> tuple[str, str]:
    """(heading, explanation) of a metric's column."""
    title = metric.heading if "_" in metric.title else metric.heading[:1].upper() + metric.heading[1:]
    return title, explained(metric)


def explained(metric: Metric) -> str:
    """What the metric is and which direction is better."""
    return (
        f"{metric.description} {metric.better.capitalize()} is better."
        if metric.better
        else metric.description
    )


def metric_table(
    comparison: Comparison,
    place: Place,
    caption: str,
    last: tuple[str, str, Callable[[CellResult], str]] | None = None,
) -> str:
    """The metrics shown at `place` that any column has, as HTML.

    last: (heading, explanation, text of a cell) of one more column, of text.
    """
    metrics = present(comparison, place)
    colours = style.comparison_colours(comparison)
    rows = []
    for cell in comparison.cells:
        mark = devices.mark(cell, reference_of(comparison, cell))
        values = [
            {
                "text": metric.format(cell),
                "times": formatting.times(ratio(comparison, cell, metric), mark),
                "key": metric.get(cell),
                "range": _range(cell, metric),
            }
            for metric in metrics
        ]
        rows.append((colours[cell.variant], cell.label, values, last[2](cell) if last else None))
    head = [("Variant", ""), *map(heading, metrics), *([last[:2]] if last else [])]
    numeric = set(range(1, len(metrics) + 1))
    return render("metric_table.html", head=head, rows=rows, caption=caption, numeric=numeric, name=place)


def _range(cell: CellResult, metric: Metric) -> str:
    """ "(14.2 to 15.1)": the lowest and highest of several runs."""
    values = run_values(cell, metric.key)
    return f"({metric.text(min(values))} to {metric.text(max(values))})" if len(values) > 1 else ""
