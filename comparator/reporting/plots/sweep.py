"""Curves of a sweep: a figure over the batch size, or over the context where one batch was swept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from comparator.capacity.points import Point
from comparator.capacity.sweep import Sweep
from comparator.reporting.plots.style import apply_layout, colours
from comparator.util import quantities

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")  # by context


@dataclass(frozen=True)
class Curve:
    """title: above the figure. unit: of its y axis."""

    title: str
    unit: str
    value: Callable[[Point], float | None]


CURVES = (
    Curve("Decode rate, all sequences together", "tok/s", lambda p: p.tok_s),
    Curve("Decode rate of one sequence", "tok/s", lambda p: p.tok_s_each),
    Curve("Inter-token latency, p50", "ms", lambda p: _scaled(p.itl_p50_s, 1e3)),
    Curve("Inter-token latency, p99", "ms", lambda p: _scaled(p.itl_p99_s, 1e3)),
    Curve("Time to first token", "ms", lambda p: _scaled(p.ttft_s, 1e3)),
    Curve("Peak memory", "MB", lambda p: _scaled(p.peak_bytes, 1e-6)),
)


def curves(sweep: Sweep) -> list[Figure]:
    """A figure for each of `CURVES`. A line per variant and context; a point that failed is missing from its line."""
    return [_figure(sweep, curve) for curve in CURVES]


def _figure(sweep: Sweep, curve: Curve) -> Figure:
    import plotly.graph_objects as go

    figure = go.Figure()
    variants = list(dict.fromkeys(point.variant for point in sweep.points))
    colour_of = colours(variants, variants[0] if variants else None)
    contexts, batches = (sorted({getattr(p, name) for p in sweep.points}) for name in ("context", "batch"))
    over_context = len(batches) == 1 and len(contexts) > 1
    for variant in variants:
        for number, context in enumerate([None] if over_context else contexts):
            points = sorted(
                (p for p in sweep.points if p.variant == variant and context in (None, p.context)),
                key=lambda p: (p.batch, p.context),
            )
            x_of = (lambda p: p.context) if over_context else (lambda p: p.batch)
            xy = [(x_of(p), y) for p in points if (y := curve.value(p)) is not None]
            if not xy:
                continue
            at = f", {quantities.short(context)}" if len(contexts) > 1 and context else ""
            figure.add_scatter(
                x=[x for x, _ in xy],
                y=[y for _, y in xy],
                name=f"{variant}{at}",
                mode="lines+markers",
                line={"color": colour_of[variant], "width": 2, "dash": DASHES[number % len(DASHES)]},
                marker={"size": 7},
                hovertemplate=f"%{{x}}: %{{y:.4g}} {curve.unit}<extra>%{{fullData.name}}</extra>",
            )
    swept = contexts if over_context else batches
    apply_layout(figure, "tokens of each prompt" if over_context else "sequences at once", curve.unit)
    figure.update_xaxes(
        type="log", rangemode="normal", tickmode="array", tickvals=swept, ticktext=[f"{n:,}" for n in swept]
    )
    return figure


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
