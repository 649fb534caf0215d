"""Latency plots: when each token came, and inter-token latency as box plots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comparator.core.result import CellResult, Comparison
from comparator.reporting.plots.style import (
    apply_layout,
    comparison_colours,
    height_for,
    height_with_legend,
    measured_cells,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

UNTIMED = "No token was timed: ask for two new tokens or more and press Run."


def token_timeline(comparison: Comparison) -> Figure:
    """Tokens written (y) over seconds since the prompt (x): TTFT is where a line starts, speed is its slope."""
    import plotly.graph_objects as go

    figure, colour_of = go.Figure(), comparison_colours(comparison)
    for cell in measured_cells(comparison):
        times_s = token_times(cell)
        if not times_s:
            continue
        figure.add_scatter(
            x=times_s,
            y=list(range(1, len(times_s) + 1)),
            name=cell.label,
            mode="lines+markers",
            line={"color": colour_of[cell.variant], "width": 2, "dash": "dot" if cell.adapter else "solid"},
            marker={"size": 4},
            hovertemplate="token %{y} after %{x:.3f} s<extra>%{fullData.name}</extra>",
        )
    height = height_with_legend(len(figure.data))
    return apply_layout(
        figure, "seconds since the prompt", "tokens", height, better=("lower", None), empty=UNTIMED
    )


def token_times(cell: CellResult) -> list[float]:
    """Seconds from the prompt to each token: TTFT, then one inter-token latency after the other."""
    first = cell.latency.ttft_s
    if first is None:
        return []
    times_s = [first]
    for gap in cell.latency.itl_s:
        times_s.append(times_s[-1] + gap)
    return times_s


def inter_token_box(comparison: Comparison) -> Figure:
    """One box a column over its inter-token latencies, in ms; the whiskers are Tukey's (1.5 × the box)."""
    import plotly.graph_objects as go

    figure, colour_of = go.Figure(), comparison_colours(comparison)
    cells = [c for c in measured_cells(comparison) if c.latency.itl_s]
    for cell in reversed(cells):  # the first column on top
        figure.add_box(
            x=[1e3 * gap for gap in cell.latency.itl_s],
            name=cell.label,
            marker={"color": colour_of[cell.variant], "size": 4},
            line={"width": 1.5},
            boxpoints="outliers",
            hovertemplate="%{x:.1f} ms<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(showlegend=False)
    return apply_layout(
        figure, "ms between tokens", None, height_for(len(cells)), better=("lower", None), empty=UNTIMED
    )
