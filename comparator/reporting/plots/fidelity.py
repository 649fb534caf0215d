"""Fidelity plots: divergence by token, memory against divergence, weight error by layer, sensitivity of parts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from comparator.core.result import CellResult, Comparison
from comparator.fidelity.verdict import divergence, floor, reference_of
from comparator.metrics.definitions import bits_per_weight, stored_bytes
from comparator.reporting.plots.style import GRID, PALETTE, TEXT, apply_layout, comparison_colours

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from comparator.fidelity.sensitivity import Part

_LAYER = re.compile(r"^(?:.*\.)?(\d+)\.(.+?)\.(?:weight|qweight)$")
LABELS = (
    "top center",
    "bottom center",
    "middle right",
    "middle left",
)  # by turns: variants of one size lie close
MOST_PARTS = 30  # bars; more could not be read
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
    return apply_layout(figure, "token of the reference's answer", "KL divergence, nats")


def _quoted(token: str) -> str:
    """A token so that white space can be seen; Plotly's hover text knows tags, so none may be in it."""
    return "“" + token.replace("\n", "⏎").replace("<", "‹").replace(">", "›").replace("&", "＆")[:40] + "”"


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
        return apply_layout(figure, _x_title(bits), "mean KL divergence, nats")
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
    for number, (cell, x, y) in enumerate(points):
        speed = cell.latency.decode_tok_s
        size_px = 10 + 26 * ((speed or 0) / fastest) ** 0.5 if fastest else 14
        own = floor(cell)
        speed_text = f"{speed:,.1f} tok/s" if speed else "speed not measured"
        figure.add_scatter(
            x=[x], y=[max(y, bottom)], name=cell.label, mode="markers+text", text=[cell.label],
            textposition=LABELS[number % len(LABELS)], textfont={"size": 12, "color": TEXT}, showlegend=False,
            error_y=_error_bar(cell, y),
            marker={"size": size_px, "color": colour_of[cell.variant], "opacity": 0.85,
                    "symbol": "diamond" if y == 0 else "circle"},
            hovertemplate=f"%{{x:,.4g}} {'bits per weight' if bits else 'MB'}<br>{_kl_words(y)}<br>{speed_text}"
                          "<extra>%{fullData.name}</extra>",
        )  # fmt: skip
        if own and own.mean > bottom:
            figure.add_scatter(
                x=[x], y=[own.mean], mode="markers", showlegend=False, name=cell.label,
                marker={"symbol": "line-ew", "size": 22, "line": {"width": 2, "color": colour_of[cell.variant]}},
                hovertemplate="its own noise floor: %{y:.2g} nats<extra>%{fullData.name}</extra>",
            )  # fmt: skip
    apply_layout(figure, _x_title(bits), "mean KL divergence, nats (log)", height=420)
    figure.update_yaxes(type="log", range=[math.log10(bottom), math.log10(top)], rangemode="normal")
    figure.update_yaxes(dtick=1, exponentformat="power")
    return figure


def _x_title(bits: bool) -> str:
    return "bits per weight, quant state included" if bits else "weights and quant state, MB (10⁶ bytes)"


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
                "title": {"text": "relative error (log)", "side": "right"}, "thickness": 14, "outlinewidth": 0,
                "tickvals": ticks, "ticktext": [f"{10**t * 100:.2g} %" for t in ticks],
            },
        )  # fmt: skip
    apply_layout(figure, None, None, height=110 + 17 * max(len(layers), 8))
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
        figure, "mean KL divergence, nats (± standard error)", None, height=90 + 24 * max(len(worst), 2)
    )
