"""Fidelity plots: divergence by token, memory against divergence, weight error by layer, sensitivity of parts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from comparator.core.result import CellResult, Comparison
from comparator.fidelity import length
from comparator.fidelity.verdict import divergence, floor, reference_of
from comparator.metrics.definitions import bits_per_weight, stored_bytes
from comparator.reporting.plots import labels
from comparator.reporting.plots.style import (
    GRID,
    PALETTE,
    TEXT,
    apply_layout,
    comparison_colours,
    height_with_legend,
)

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from comparator.fidelity.sensitivity import Part

_LAYER = re.compile(r"^(?:.*\.)?(\d+)\.(.+?)\.(?:weight|qweight)$")
MOST_PARTS = 30  # bars; more could not be read
UNSCORED = "Nothing was scored: select an option under Fidelity and press Run."
HEIGHT_PX = 420  # of the trade-off
MARGINS_PX = {"l": 74, "r": 14, "t": 34, "b": 58}
LONGEST = 20  # letters of a label
WIDTHS_PX = (
    190,
    260,
    330,
    420,
    560,
    800,
    1100,
)  # of the area within its margins: from a phone to a wide screen
SMALLEST = 1e-7  # divergences below this are drawn here: a logarithmic axis has no 0


def kl_by_token(comparison: Comparison) -> Figure:
    """KL divergence (y) at each token of the reference's answer (x), the columns over each other."""
    import plotly.graph_objects as go

    figure, colour_of = go.Figure(), comparison_colours(comparison)
    tokens: tuple[str, ...] = ()
    for cell in comparison.cells:
        prompt = cell.fidelity.prompt if cell.fidelity else None
        if prompt is None or not prompt.kl or cell is reference_of(comparison, cell):
            continue
        tokens = prompt.tokens if len(prompt.tokens) > len(tokens) else tokens
        texts = [prompt.tokens[i] if i < len(prompt.tokens) else "" for i in range(len(prompt.kl))]
        figure.add_scatter(
            x=list(range(1, len(prompt.kl) + 1)),
            y=list(prompt.kl),
            name=f"{cell.label} (≥: a lower bound)" if prompt.at_least else cell.label,
            mode="lines+markers",
            line={"color": colour_of[cell.variant], "width": 2, "dash": "dot" if cell.adapter else "solid"},
            marker={"size": 4},
            customdata=[_quoted(t) for t in texts],
            hovertemplate="token %{x}, %{customdata}: %{y:.4f} nats<extra>%{fullData.name}</extra>",
        )
        first = prompt.first_difference
        if first is not None and 0 <= first < len(prompt.kl):
            figure.add_scatter(
                x=[first + 1], y=[prompt.kl[first]], mode="markers", showlegend=False, name=cell.label,
                marker={"symbol": "diamond-open", "size": 12, "color": colour_of[cell.variant], "line": {"width": 2}},
                hovertemplate="first different choice, token %{x}<extra>%{fullData.name}</extra>",
            )  # fmt: skip
    return apply_layout(
        figure,
        "token of the reference's answer",
        "KL divergence, nats",
        height_with_legend(sum(trace.showlegend is not False for trace in figure.data)),
        better=(None, "lower"),
        empty=UNSCORED,
    )


def _quoted(token: str) -> str:
    """A token so that white space can be seen."""
    return "“" + _plain(token.replace("\n", "⏎"))[:40] + "”"


def _plain(text: str) -> str:
    """Without what Plotly reads as a tag or an entity."""
    return text.replace("<", "‹").replace(">", "›").replace("&", "＆")


def kl_over_length(comparison: Comparison) -> Figure:
    """Mean KL divergence (y) over the tokens that were read before (x), on the text; bars are standard errors."""
    import plotly.graph_objects as go

    figure, colour_of, ends = go.Figure(), comparison_colours(comparison), set()
    for cell, buckets in length.measured(comparison):
        ends |= {bucket.high for bucket in buckets}
        figure.add_scatter(
            x=[bucket.high for bucket in buckets],
            y=[bucket.kl for bucket in buckets],
            error_y={"array": [bucket.kl_se or 0 for bucket in buckets], "thickness": 1.2, "width": 3},
            name=cell.label,
            mode="lines+markers",
            line={"color": colour_of[cell.variant], "width": 2, "dash": "dot" if cell.adapter else "solid"},
            marker={"size": 7},
            customdata=[[b.low + 1, b.tokens, f"{b.agree:.1%}"] for b in buckets],
            hovertemplate="after %{customdata[0]:,} to %{x:,} tokens: %{y:.4g} nats, %{customdata[2]} agree "
            "(%{customdata[1]:,} positions)<extra>%{fullData.name}</extra>",
        )
    apply_layout(figure, "tokens read before", "KL divergence, nats")
    ticks = sorted(ends)
    figure.update_xaxes(
        type="log", rangemode="normal", tickmode="array", tickvals=ticks, ticktext=[f"{n:,}" for n in ticks]
    )
    return figure


def trade_off(comparison: Comparison, bits: bool = False) -> Figure:
    """The picture people came for: memory in MB, or bits per weight, (x) against mean KL divergence (y, logarithmic).

    Dots grow with decode speed. The step line is the Pareto front: no column is both smaller and nearer to the
    reference. The grey band is the reference's own noise floor, a dash below a dot its column's. The reference, 0
    by definition, is drawn at the bottom.
    """
    import plotly.graph_objects as go

    figure, colour_of = go.Figure(), comparison_colours(comparison)
    points = [
        (cell, x, y)
        for cell in comparison.cells
        if (x := _place(cell, bits)) and (y := _height(comparison, cell)) is not None
    ]
    if not points:
        return apply_layout(figure, _x_title(bits), "mean KL divergence, nats", empty=UNSCORED)
    heights = [max(y, SMALLEST) for _, _, y in points if y > 0]
    floors = [f.mean for c, _, _ in points if (f := floor(c)) and f.mean > 0]
    bottom = max(SMALLEST, min(heights, default=1e-4) / 5)
    top = max([*heights, *floors], default=1e-2) * 3
    reference = next((c for c in comparison.cells if c is reference_of(comparison, c)), None)
    own = floor(reference) if reference else None
    if own and own.mean > bottom:
        figure.add_hrect(
            y0=bottom, y1=own.mean, fillcolor=GRID, line_width=0, layer="below",
            annotation_text="noise floor of the reference", annotation_position="bottom right",
            annotation_font={"size": 11, "color": TEXT},
        )  # fmt: skip
    front = pareto([(x, y) for _, x, y in points])
    figure.add_scatter(
        x=[x for x, _ in front], y=[max(y, bottom) for _, y in front], mode="lines", name="Pareto front",
        line={"color": TEXT, "width": 1, "dash": "dash", "shape": "hv"}, hoverinfo="skip",
    )  # fmt: skip
    fastest = max((c.latency.decode_tok_s or 0 for c, _, _ in points), default=0)
    sizes_px = [_dot_px(cell, fastest) for cell, _, _ in points]
    for (cell, x, y), size_px in zip(points, sizes_px, strict=True):
        speed, own = cell.latency.decode_tok_s, floor(cell)
        speed_text = f"{speed:,.1f} tok/s" if speed else "speed not measured"
        figure.add_scatter(
            x=[x], y=[max(y, bottom)], name=cell.label, mode="markers", showlegend=False, cliponaxis=False,
            error_y=_error_bar(cell, y), customdata=[f"{_kl_words(y)}, {speed_text}"],
            marker={"size": size_px, "color": colour_of[cell.variant], "opacity": 0.85,
                    "symbol": "diamond" if cell is reference else "circle"},
            hovertemplate=f"%{{x:,.4g}} {'bits per weight' if bits else 'MB'}<br>%{{customdata}}"
                          "<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        if own and own.mean > bottom:
            figure.add_scatter(
                x=[x], y=[own.mean], mode="markers", showlegend=False, name=cell.label,
                marker={"symbol": "line-ew", "size": 22, "line": {"width": 2, "color": colour_of[cell.variant]}},
                hovertemplate="its own noise floor: %{y:.2g} nats<extra>%{fullData.name}</extra>",
            )  # fmt: skip
    apply_layout(
        figure, _x_title(bits), "mean KL divergence, nats (log)", HEIGHT_PX, better=("lower", "lower")
    )
    right, low, high = max(x for _, x, _ in points) * 1.08, math.log10(bottom), math.log10(top)
    # The labels' places are computed for these ranges and margins.
    figure.update_layout(margin=MARGINS_PX, legend={"x": 0.97, "xanchor": "right"})
    figure.update_xaxes(range=[0, right], rangemode="normal", automargin=False)
    figure.update_yaxes(type="log", range=[low, high], rangemode="normal", automargin=False)
    figure.update_yaxes(dtick=1, exponentformat="power")
    height = HEIGHT_PX - MARGINS_PX["t"] - MARGINS_PX["b"]
    frames = [(0.0, 0.0, width, height) for width in WIDTHS_PX]
    levels = [math.log10(max(y, bottom)) for _, _, y in points]
    dots = [
        labels.Point(
            labels.short(cell.label, LONGEST),
            size_px / 2
            if cell is not reference
            else size_px * 0.65,  # a diamond reaches further than a circle
            tuple((x / right * width, (high - level) / (high - low) * height) for width in WIDTHS_PX),
        )
        for (cell, x, _), level, size_px in zip(points, levels, sizes_px, strict=True)
    ]
    spots = labels.place(dots, frames)
    for (cell, x, _), level, dot, spot in zip(points, levels, dots, spots, strict=True):
        figure.add_annotation(x=x, y=level, **_label(dot.label, cell.label, spot))
    return figure


def _dot_px(cell: CellResult, fastest: float) -> float:
    """Diameter of a column's dot; its area grows with the speed."""
    return 8 + 16 * ((cell.latency.decode_tok_s or 0) / fastest) ** 0.5 if fastest else 12.0


def _label(text: str, whole: str, spot: labels.Spot) -> dict:
    """A column's name beside its dot as a Plotly annotation, the whole name on hover."""
    shift = (
        {"showarrow": True, "ax": spot.dx, "ay": spot.dy, "arrowhead": 0, "arrowwidth": 1, "arrowcolor": TEXT}
        if spot.far
        else {"showarrow": False, "xshift": spot.dx, "yshift": -spot.dy}
    )
    return {
        "text": _plain(text), "hovertext": _plain(whole) if text != whole else None, "xanchor": "center",
        "yanchor": "middle", "borderpad": 0, "font": {"size": 12, "color": TEXT}, **shift,
    }  # fmt: skip


def _x_title(bits: bool) -> str:
    return "bits per weight, with quant state" if bits else "weights + quant state, MB"


def _kl_words(y: float) -> str:
    return "the reference: 0 by definition" if y == 0 else f"{y:.3g} nats"


def _error_bar(cell: CellResult, y: float) -> dict | None:
    kl = divergence(cell)
    if not kl or not kl.se or y <= 0:
        return None
    return {
        "type": "data",
        "array": [2 * kl.se],
        "arrayminus": [min(2 * kl.se, y * 0.9)],
        "thickness": 1.5,
        "width": 4,
    }


def _place(cell: CellResult, bits: bool) -> float | None:
    if bits:
        return bits_per_weight(cell)
    total = stored_bytes(cell)
    return None if not total else total / 1e6


def _height(comparison: Comparison, cell: CellResult) -> float | None:
    if cell is reference_of(comparison, cell):
        return 0.0
    kl = divergence(cell)
    return None if kl is None else kl.mean


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of the points (smaller is better in both) that no other beats in both, by x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points)):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def layer_grid(
    cell: CellResult, key: str = "relative"
) -> tuple[list[str], list[str], list[list[float | None]]]:
    """(modules, layers, values[layer][module]) of the weight errors of a column; empty lists where there are none."""
    return grid(
        {
            row.name: row.error[key]
            for row in cell.layers
            if row.error and key in row.error and len(row.shape) > 1
        }
    )


def grid(values: dict[str, float]) -> tuple[list[str], list[str], list[list[float | None]]]:
    """`model.layers.3.mlp.up_proj.weight` → layer 3, module mlp.up_proj; names without a number are left out."""
    cells: dict[tuple[int, str], float] = {}
    modules: dict[str, None] = {}
    for name, value in values.items():
        match = _LAYER.match(name if name.endswith("weight") else name + ".weight")
        if match:
            cells[int(match[1]), match[2]] = value
            modules.setdefault(match[2])
    layers = sorted({layer for layer, _ in cells})
    return list(modules), [str(n) for n in layers], [[cells.get((n, m)) for m in modules] for n in layers]


def layer_map(cell: CellResult) -> Figure:
    """Heat map: how far each layer's weights are from the reference's, by module (relative Frobenius error).

    Layers down, modules across. The colours span this column's own errors on a logarithmic scale: on one that starts at 0 a
    4-bit column would be of a single colour.
    """
    import plotly.graph_objects as go

    modules, layers, values = layer_grid(cell)
    figure = go.Figure()
    errors = [v for row in values for v in row if v]
    if layers and errors:
        low, high = math.log10(min(errors)), math.log10(max(errors))
        ticks = [low + (high - low) * step / 4 for step in range(5)] if high > low else [low]
        figure.add_heatmap(
            x=modules, y=[f"layer {n}" for n in layers], colorscale="Cividis", zmin=low, zmax=max(high, low + 1e-3),
            z=[[math.log10(v) if v else None for v in row] for row in values], customdata=values,
            hovertemplate="%{y}, %{x}: %{customdata:.2%}<extra></extra>", xgap=1, ygap=1,
            colorbar={
                "title": {"text": "← better: relative error (log)", "side": "right", "font": {"size": 12}}, "thickness": 14, "outlinewidth": 0,
                "tickvals": ticks, "ticktext": [f"{10**t * 100:.2g} %" for t in ticks],
            },
        )  # fmt: skip
    apply_layout(
        figure,
        None,
        None,
        110 + 17 * max(len(layers), 8),
        empty="No weight errors: this variant's weights are the reference's.",
    )
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, rangemode="normal")
    figure.update_xaxes(type="category", showgrid=False, rangemode="normal")
    return figure


def parts_bars(parts: Sequence[Part], colour: str = PALETTE[0]) -> Figure:
    """One bar a part of the model, quantized alone: mean KL divergence ± its standard error, the worst on top.
    At most MOST_PARTS are drawn; the table behind the figure has all of them."""
    import plotly.graph_objects as go

    worst = sorted(parts, key=lambda part: -part.kl_mean)[:MOST_PARTS][::-1]
    figure = go.Figure()
    if worst:
        figure.add_bar(
            x=[p.kl_mean for p in worst], y=[p.name for p in worst], orientation="h", showlegend=False,
            marker={"color": colour, "line": {"width": 0}},
            error_x={"type": "data", "array": [p.kl_se or 0 for p in worst], "thickness": 1.5, "width": 3},
            customdata=[p.top1 for p in worst],
            hovertemplate="%{x:.3g} nats, agrees %{customdata:.1%}<extra>%{y}</extra>",
        )  # fmt: skip
    return apply_layout(
        figure,
        "mean KL divergence, nats (± standard error)",
        None,
        90 + 24 * max(len(worst), 2),
        better=("lower", None),
    )
