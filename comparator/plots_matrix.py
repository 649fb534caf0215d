"""A comparison → the heat map variants × adapters of one figure. Pure: knows nothing of a page, a file or torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from comparator import figures, words
from comparator.figures import Figure as Kind
from comparator.plots import FONT, TEXT
from comparator.types import CellResult, Comparison

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NO_ADAPTER = "none"
# What a person asks of the matrix first; every other figure that the columns have follows.
FIRST = (
    "decode_tok_s",
    "ttft_s",
    "resident_bytes",
    "adapter_bytes",
    "prompt_kl_mean",
    "adapter_drift",
    "adapter_effect",
    "text_kl_mean",
)
_UNSUITED = {"load_s", "footprint_bytes", "loaded_weight_bytes", "loaded_quant_state_bytes"}
# Light to dark in one hue: the order is told by lightness alone, for every kind of colour vision. The value stands
# in each cell, so the darkest is still light enough for dark ink, on a light page and on a dark one.
_SCALE = ((0.0, "#eff5fb"), (1.0, "#7db2df"))
_INK = "#14263a"


def is_matrix(comparison: Comparison) -> bool:
    """Whether there is anything to lay out: at least one column with an adapter."""
    return any(cell.adapter for cell in comparison.cells)


def choices(comparison: Comparison) -> list[tuple[str, str]]:
    """(words, key) of the figures that at least one column has."""
    keys = dict.fromkeys((*FIRST, *(f.key for f in figures.FIGURES if f.key not in _UNSUITED)))
    present = figures.present(comparison, tuple(k for k in keys if k in figures.BY_KEY))
    return [(f"{f.title}, {f.unit}" if f.unit else f.title, f.key) for f in present]


def axes(comparison: Comparison) -> tuple[list[str], list[str]]:
    """(variants, adapters) in the order of the columns; “none” first."""
    variants = list(dict.fromkeys(cell.variant for cell in comparison.cells))
    adapters = list(dict.fromkeys(cell.adapter or NO_ADAPTER for cell in comparison.cells))
    return variants, sorted(adapters, key=lambda name: name != NO_ADAPTER)


def at(comparison: Comparison, variant: str, adapter: str) -> CellResult | None:
    return comparison.cell(variant, None if adapter == NO_ADAPTER else adapter)


def heat_map(comparison: Comparison, key: str) -> Figure:
    """Variants (y, the first on top) × adapters (x), coloured by the figure `key` of `figures.FIGURES`; its value is
    written in each cell, “–” where it was not measured, and nothing where there is no such column."""
    import plotly.graph_objects as go

    kind = figures.BY_KEY[key]
    variants, adapters = axes(comparison)
    cells = [[at(comparison, v, a) for a in adapters] for v in variants]
    values = [[kind.get(c) if c else None for c in row] for row in cells]
    figure = go.Figure(
        go.Heatmap(
            x=adapters,
            y=variants,
            z=values,
            text=[[_written(kind, c) for c in row] for row in cells],
            customdata=[[_told(kind, c) for c in row] for row in cells],
            texttemplate="%{text}",
            textfont={"color": _INK, "size": 14},
            hovertemplate="%{y} + %{x}<br>%{customdata}<extra></extra>",
            hoverongaps=False,
            colorscale=_SCALE,
            showscale=_spread(values),
            colorbar={"title": {"text": kind.unit}, "thickness": 10, "outlinewidth": 0},
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
    for row, variant in enumerate(variants):  # a gap of the heat map writes no text of its own
        for column, adapter in enumerate(adapters):
            if cells[row][column] is not None and values[row][column] is None:
                figure.add_annotation(x=adapter, y=variant, text=words.NONE, showarrow=False)
    return figure


def table(comparison: Comparison, key: str) -> tuple[list[str], list[list[str]]]:
    """The same as a table: (heads, rows of texts); an empty text where there is no such column."""
    kind = figures.BY_KEY[key]
    variants, adapters = axes(comparison)
    rows = [[v, *(_written(kind, at(comparison, v, a)) for a in adapters)] for v in variants]
    return ["variant", *adapters], rows


def _written(kind: Kind, cell: CellResult | None) -> str:
    if cell is None:
        return ""
    if cell.status == "failed":
        return "failed"
    return kind.written(cell)


def _told(kind: Kind, cell: CellResult | None) -> str:
    if cell is None:
        return "not a column"
    if cell.error:
        return cell.error.problem.replace("<", "‹")  # Plotly reads tags in a hover text
    return f"{kind.title}: {kind.written(cell)} {kind.unit}".strip()


def _spread(values: list[list[float | None]]) -> bool:
    return len({v for row in values for v in row if v is not None}) > 1
