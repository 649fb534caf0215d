"""A comparison → Plotly figures. Pure functions: knows nothing of a page, of a file or of torch.

A variant has one colour everywhere: the reference is neutral, the others take Okabe and Ito's colour-blind safe
palette ("Color Universal Design", 2008) in the order of the columns. Figures have no background of their own, so
that they sit on a light and on a dark page.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from comparator.types import CellResult, Comparison

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NEUTRAL = "#7d8490"
# Yellow last: on white it is the hardest to see. The second row is for those who raise the limit of 8 columns.
PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442",
    "#004c77", "#8e3f00", "#00694d", "#88506f", "#996a00", "#396e9b", "#a09810",
)  # fmt: skip
TEXT = "#6b7280"
GRID = "rgba(128,134,145,0.22)"
FONT = "IBM Plex Sans, system-ui, sans-serif"

# What a variant's memory is made of, from the axis outwards: (figure's name, words, fill pattern).
PARTS = (
    ("weight_bytes", "weights", ""),
    ("quant_state_bytes", "quant state", "/"),
    ("adapter_bytes", "adapter", "x"),
    ("kv_cache_bytes", "KV cache", "."),
)


def colours(variants: Iterable[str], reference: str | None) -> dict[str, str]:
    """Variant notation → its colour. The reference is neutral; columns of one variant share its colour."""
    named: dict[str, str] = {}
    for variant in variants:
        if variant not in named:
            taken = len(named) - (reference in named)
            named[variant] = NEUTRAL if variant == reference else PALETTE[taken % len(PALETTE)]
    return named


def comparison_colours(comparison: Comparison) -> dict[str, str]:
    """The colours of a comparison's variants."""
    reference = comparison.reference.variant if comparison.reference else None
    return colours((cell.variant for cell in comparison.cells), reference)


def token_timeline(comparison: Comparison) -> Figure:
    """Tokens written (y) over seconds since the prompt (x): TTFT is where a line starts, speed is its slope."""
    import plotly.graph_objects as go

    figure, named = go.Figure(), comparison_colours(comparison)
    for cell in _measured(comparison):
        times_s = token_times(cell)
        if not times_s:
            continue
        figure.add_scatter(
            x=times_s,
            y=list(range(1, len(times_s) + 1)),
            name=cell.label,
            mode="lines+markers",
            line={"color": named[cell.variant], "width": 2, "dash": "dot" if cell.adapter else "solid"},
            marker={"size": 4},
            hovertemplate="token %{y} after %{x:.3f} s<extra>%{fullData.name}</extra>",
        )
    return _laid_out(figure, "seconds since the prompt", "tokens")


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

    figure, named = go.Figure(), comparison_colours(comparison)
    cells = [c for c in _measured(comparison) if c.latency.itl_s]
    for cell in reversed(cells):  # the first column on top
        figure.add_box(
            x=[1e3 * gap for gap in cell.latency.itl_s],
            name=cell.label,
            marker={"color": named[cell.variant], "size": 4},
            line={"width": 1.5},
            boxpoints="outliers",
            hovertemplate="%{x:.1f} ms<extra>%{fullData.name}</extra>",
        )
    figure.update_layout(showlegend=False)
    return _laid_out(figure, "ms between two tokens", None, height=_rows_high(len(cells)))


def memory_bars(comparison: Comparison) -> Figure:
    """One stacked bar a column: weights, quant state, adapter, KV cache, in MB = 10^6 bytes; a diamond marks the
    highest use while it ran."""
    import plotly.graph_objects as go

    figure, named = go.Figure(), comparison_colours(comparison)
    cells = [c for c in reversed(_measured(comparison)) if c.memory.weight_bytes is not None]
    labels = [c.label for c in cells]
    for name, words, pattern in PARTS:
        values = [getattr(c.memory, name) for c in cells]
        if not any(values):
            continue
        figure.add_bar(
            y=labels,
            x=[None if v is None else v / 1e6 for v in values],
            orientation="h",
            name=words,
            showlegend=False,
            marker=_filled([named[c.variant] for c in cells], pattern),
            hovertemplate="%{x:,.1f} MB " + words + "<extra>%{y}</extra>",
        )
        # The legend tells the parts apart by pattern; a bar of its own keeps it from taking one column's colour.
        figure.add_bar(y=[None], x=[None], orientation="h", name=words, marker=_filled(NEUTRAL, pattern))
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
    return _laid_out(figure, "MB (10⁶ bytes)", None, height=_rows_high(len(cells)) + 30)


def _filled(colour: str | list[str], pattern: str) -> dict:
    return {
        "color": colour,
        "line": {"width": 0},
        "pattern": {"shape": pattern, "size": 5, "solidity": 0.35, "fillmode": "overlay"},
    }


def _measured(comparison: Comparison) -> list[CellResult]:
    return [cell for cell in comparison.cells if cell.status != "failed"]


def _rows_high(rows: int) -> int:
    return 90 + 44 * max(rows, 1)


def _laid_out(figure: Figure, x_title: str, y_title: str | None, height: int = 320) -> Figure:
    figure.update_layout(
        height=height,
        margin={"l": 8, "r": 12, "t": 34, "b": 8},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": FONT, "size": 13, "color": TEXT},
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        hoverlabel={"font": {"family": FONT, "size": 13}},
        modebar={"remove": ["lasso2d", "select2d", "autoScale2d", "zoomIn2d", "zoomOut2d"], "color": TEXT},
    )
    axis = {
        "gridcolor": GRID,
        "zeroline": False,
        "automargin": True,
        "title_font": {"size": 13},
        "ticklabelstandoff": 6,
    }
    figure.update_xaxes(title_text=x_title, title_standoff=12, rangemode="tozero", **axis)
    figure.update_yaxes(
        title_text=y_title, **(axis if y_title else axis | {"showgrid": False, "type": "category"})
    )
    if y_title:
        figure.update_yaxes(rangemode="tozero")
    return figure
