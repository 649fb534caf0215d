"""Matrix plot: one metric for every variant and adapter, as a heat map and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comparator.core.result import CellResult, Comparison
from comparator.metrics.definitions import METRICS, Metric, present
from comparator.reporting.plots.style import FONT, TEXT
from comparator.util import formatting

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NO_ADAPTER = "none"
# Light to dark in one hue: lightness alone gives the order, for every kind of colour vision. The value is written in
# each cell, so the darkest is still light enough for dark ink, on a light page and on a dark one.
_SCALE = ((0.0, "#eff5fb"), (1.0, "#7db2df"))
_INK = "#14263a"


def is_matrix(comparison: Comparison) -> bool:
    """Whether there is a matrix to show: at least one column has an adapter."""
    return any(cell.adapter for cell in comparison.cells)


def choices(comparison: Comparison) -> list[tuple[str, str]]:
    """(heading, key) of the metrics that at least one column has, those of the key table first."""
    metrics = present(comparison, "matrix")
    return [(m.heading, m.key) for m in sorted(metrics, key=lambda m: "key" not in m.shown)]


def axes(comparison: Comparison) -> tuple[list[str], list[str]]:
    """(variants, adapters) in the order of the columns; “none” first."""
    variants = list(dict.fromkeys(cell.variant for cell in comparison.cells))
    adapters = list(dict.fromkeys(cell.adapter or NO_ADAPTER for cell in comparison.cells))
    return variants, sorted(adapters, key=lambda name: name != NO_ADAPTER)


def at(comparison: Comparison, variant: str, adapter: str) -> CellResult | None:
    return comparison.cell(variant, None if adapter == NO_ADAPTER else adapter)


def heat_map(comparison: Comparison, key: str) -> Figure:
    """Variants (y, the first on top) × adapters (x), coloured by the metric `key`.

    The value is written in each cell: “–” where it was not measured, nothing where there is no such column.
    """
    import plotly.graph_objects as go

    metric = METRICS[key]
    variants, adapters = axes(comparison)
    cells = [[at(comparison, v, a) for a in adapters] for v in variants]
    values = [[metric.get(c) if c else None for c in row] for row in cells]
    figure = go.Figure(
        go.Heatmap(
            x=adapters,
            y=variants,
            z=values,
            text=[[_text(metric, c) for c in row] for row in cells],
            customdata=[[_hover(metric, c) for c in row] for row in cells],
            texttemplate="%{text}",
            textfont={"color": _INK, "size": 14},
            hovertemplate="%{y} + %{x}<br>%{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale=_SCALE,
            showscale=_spread(values),
            colorbar={"title": {"text": metric.unit}, "thickness": 10, "outlinewidth": 0},
            xgap=3,
            ygap=3,
        )
    )
    figure.update_layout(
        height=110 + 46 * len(variants),
        margin={"l": 8, "r": 8, "t": 34, "b": 8},
        font={"family": FONT, "color": TEXT, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
    )
    figure.update_xaxes(side="top", type="category", showgrid=False, fixedrange=True, automargin=True)
    figure.update_yaxes(
        autorange="reversed", type="category", showgrid=False, fixedrange=True, automargin=True
    )
    for row, variant in enumerate(variants):  # a gap of the heat map has no text
        for column, adapter in enumerate(adapters):
            if cells[row][column] is not None and values[row][column] is None:
                figure.add_annotation(x=adapter, y=variant, text=formatting.NONE, showarrow=False)
    return figure


def table(comparison: Comparison, key: str) -> tuple[list[str], list[list[str]]]:
    """The same as a table: (heads, rows of texts); an empty text where there is no such column."""
    metric = METRICS[key]
    variants, adapters = axes(comparison)
    rows = [[v, *(_text(metric, at(comparison, v, a)) for a in adapters)] for v in variants]
    return ["variant", *adapters], rows


def _text(metric: Metric, cell: CellResult | None) -> str:
    if cell is None:
        return ""
    if cell.status == "failed":
        return "failed"
    return metric.format(cell)


def _hover(metric: Metric, cell: CellResult | None) -> str:
    if cell is None:
        return "not a column"
    if cell.error:
        return cell.error.problem.replace("<", "‹")  # Plotly reads tags in a hover text
    return f"{metric.title}: {metric.format(cell)} {metric.unit}".strip()


def _spread(values: list[list[float | None]]) -> bool:
    return len({v for row in values for v in row if v is not None}) > 1
