"""What all plots share: the colour of each variant, fonts and the layout.

A variant has one colour everywhere: the reference is neutral, the others take Okabe and Ito's colour-blind safe
palette ("Color Universal Design", 2008) in the order of the columns. The background is transparent, for light and
dark pages.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Literal

from comparator.core.result import CellResult, Comparison

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Better = Literal["lower", "higher"] | None
NEUTRAL = "#7d8490"
# Yellow last: it has the least contrast on white. The second row is for a limit above 8 columns.
PALETTE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#f0e442",
    "#004c77", "#8e3f00", "#00694d", "#88506f", "#996a00", "#396e9b", "#a09810",
)  # fmt: skip
TEXT = "#6b7280"
GRID = "rgba(128,134,145,0.22)"
FONT = "IBM Plex Sans, system-ui, sans-serif"


def colours(variants: Iterable[str], reference: str | None) -> dict[str, str]:
    """Variant notation → its colour. The reference is neutral; columns of one variant share its colour."""
    colour_of: dict[str, str] = {}
    for variant in variants:
        if variant not in colour_of:
            used = len(colour_of) - (reference in colour_of)
            colour_of[variant] = NEUTRAL if variant == reference else PALETTE[used % len(PALETTE)]
    return colour_of


def comparison_colours(comparison: Comparison) -> dict[str, str]:
    """The colours of a comparison's variants."""
    reference = comparison.reference.variant if comparison.reference else None
    return colours((cell.variant for cell in comparison.cells), reference)


def measured_cells(comparison: Comparison) -> list[CellResult]:
    """The columns that have something to plot."""
    return [cell for cell in comparison.cells if cell.status != "failed"]


def height_for(rows: int) -> int:
    """Pixels that a plot with one category per column needs."""
    return 90 + 44 * max(rows, 1)


def height_with_legend(entries: int) -> int:
    """Pixels of a plot with so many lines: on a phone each has a line of the legend."""
    return 320 + 20 * max(0, entries - 4)


def apply_layout(
    figure: Figure,
    x_title: str | None,
    y_title: str | None,
    height: int = 320,
    *,
    better: tuple[Better, Better] = (None, None),
    empty: str = "",
) -> Figure:
    """Set axis titles, fonts, grid and legend of a figure.

    y_title: None where the y axis holds categories.
    better: which end of the x axis and of the y axis is the better one; written beside the title.
    empty: what to do to get data, shown in place of the axes where the figure has none.
    """
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
        "title_font": {"size": 12},
        "ticklabelstandoff": 6,
    }
    x_better, y_better = better
    figure.update_xaxes(
        title_text=_directed(x_title, x_better), title_standoff=12, rangemode="tozero", **axis
    )
    figure.update_yaxes(
        title_text=_directed(y_title, y_better),
        **(axis if y_title else axis | {"showgrid": False, "type": "category"}),
    )
    if y_title:
        figure.update_yaxes(rangemode="tozero")
    if empty and not figure.data:
        figure.update_layout(height=90, margin={"t": 8})
        figure.update_xaxes(visible=False)
        figure.update_yaxes(visible=False)
        figure.add_annotation(text=empty, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False)
    return figure


def _directed(title: str | None, better: Better) -> str | None:
    """An axis title with an arrow to the better end; on a vertical axis, whose title is turned, it points down or up."""
    if better is None or not title:
        return title
    return f"← better: {title}" if better == "lower" else f"{title}: better →"
