"""Memory plot: stacked bars of weights, quant state, adapter and KV cache per column."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comparator.core.result import Comparison
from comparator.reporting.plots.style import (
    NEUTRAL,
    TEXT,
    apply_layout,
    comparison_colours,
    height_for,
    measured_cells,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


def memory_bars(comparison: Comparison) -> Figure:
    """One stacked bar a column: weights, quant state, adapter, KV cache, in MB = 10^6 bytes; a diamond marks the
    highest use while it ran."""
    import plotly.graph_objects as go

    figure, colour_of = go.Figure(), comparison_colours(comparison)
    cells = [c for c in reversed(measured_cells(comparison)) if c.memory.weight_bytes is not None]
    labels = [c.label for c in cells]
    for name, label, pattern in PARTS:
        values = [getattr(c.memory, name) for c in cells]
        if not any(values):
            continue
        figure.add_bar(
            y=labels,
            x=[None if v is None else v / 1e6 for v in values],
            orientation="h",
            name=label,
            showlegend=False,
            marker=filled([colour_of[c.variant] for c in cells], pattern),
            hovertemplate="%{x:,.1f} MB " + label + "<extra>%{y}</extra>",
        )
        # The legend shows the parts by pattern; an empty neutral bar keeps it from taking one column's colour.
        figure.add_bar(y=[None], x=[None], orientation="h", name=label, marker=filled(NEUTRAL, pattern))
    peaks = [c.memory.run_peak_bytes for c in cells]
    if any(peaks):
        figure.add_scatter(
            y=labels,
            x=[None if p is None else p / 1e6 for p in peaks],
            mode="markers",
            name="peak while running",
            marker={"symbol": "diamond-open", "size": 9, "color": TEXT, "line": {"width": 2}},
            hovertemplate="%{x:,.1f} MB at the peak<extra>%{y}</extra>",
        )
    figure.update_layout(barmode="stack", bargap=0.45)
    return apply_layout(figure, "MB (10⁶ bytes)", None, height_for(len(cells)) + 30, better=("lower", None))


# What a variant's memory consists of, from the axis outwards: (field of Memory, label, fill pattern).
PARTS = (
    ("weight_bytes", "weights", ""),
    ("quant_state_bytes", "quant state", "/"),
    ("adapter_bytes", "adapter", "x"),
    ("kv_cache_bytes", "KV cache", "."),
)


def filled(colour: str | list[str], pattern: str) -> dict:
    """Plotly's marker of bars in these colours with a fill pattern."""
    return {
        "color": colour,
        "line": {"width": 0},
        "pattern": {"shape": pattern, "size": 5, "solidity": 0.35, "fillmode": "overlay"},
    }
