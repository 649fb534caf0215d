"""Training plots: the loss curve, sample lengths, and the loss of each variant with and without the adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from comparator.reporting.plots.memory import filled
from comparator.reporting.plots.style import NEUTRAL, PALETTE, TEXT, apply_layout, colours, height_for
from comparator.training.types import Evaluation, LossPoint, TokenStatistics

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LOSS, EVAL = PALETTE[0], PALETTE[1]
LEAST_SPAN = 5  # steps that smoothing averages over; a run shorter than twice as many is not smoothed
MOST_POINTS = 600  # of a line; a browser draws every update again


def loss_curve(curve: Sequence[LossPoint], of: int = 0) -> Figure:
    """Loss in nats (left axis) and learning rate (right axis) over steps.

    The loss of each step is thin once its smoothed line exists; diamonds are the held-out samples.

    of: the last step of the run; the x axis extends to it from the start.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    losses = [(p.step, p.loss) for p in curve if p.loss is not None]
    trained, span = _thinned(losses), max(LEAST_SPAN, len(losses) // 20)
    smooth = _thinned(smoothed(losses, span)) if len(losses) > 2 * LEAST_SPAN else []
    rates = _thinned([(p.step, p.learning_rate) for p in curve if p.learning_rate is not None])
    held_out = _thinned([(p.step, p.eval_loss) for p in curve if p.eval_loss is not None])
    if trained:
        figure.add_scatter(
            x=[x for x, _ in trained], y=[y for _, y in trained], name="loss",
            mode="lines+markers" if len(trained) <= 60 else "lines",
            line={"color": LOSS, "width": 1 if smooth else 2}, marker={"size": 4}, opacity=0.45 if smooth else 1.0,
            hovertemplate="step %{x}: %{y:.4f} nats<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    if smooth:
        figure.add_scatter(
            x=[x for x, _ in smooth], y=[y for _, y in smooth], name="smoothed", mode="lines",
            line={"color": LOSS, "width": 2.5},
            hovertemplate=f"step %{{x}}: %{{y:.4f}} nats, mean over about {span} steps<extra>%{{fullData.name}}</extra>",
        )  # fmt: skip
    if held_out:
        figure.add_scatter(
            x=[x for x, _ in held_out], y=[y for _, y in held_out], name="evaluation loss", mode="lines+markers",
            line={"color": EVAL, "width": 2, "dash": "dot"},
            marker={"size": 9, "symbol": "diamond-open", "line": {"width": 2}},
            hovertemplate="after step %{x}: %{y:.4f} nats, held-out<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    if rates:
        figure.add_scatter(
            x=[x for x, _ in rates], y=[y for _, y in rates], name="learning rate", mode="lines", yaxis="y2",
            line={"color": NEUTRAL, "width": 1.5, "dash": "dash"},
            hovertemplate="step %{x}: %{y:.3g}<extra>%{fullData.name}</extra>",
        )  # fmt: skip
    apply_layout(figure, "step", "loss, nats", height=300, better=(None, "lower"))
    if rates:
        right = {
            "overlaying": "y",
            "side": "right",
            "showgrid": False,
            "zeroline": False,
            "rangemode": "tozero",
        }
        figure.update_layout(
            yaxis2={
                **right,
                "automargin": True,
                "tickformat": ".1e",
                "title": {"text": "learning rate", "font": {"size": 12}},
            }
        )
    last = max([of, *(x for x, _ in trained), *(x for x, _ in held_out), 1])
    figure.update_xaxes(range=[-0.02 * last, last * 1.02], rangemode="normal")
    if last <= 10:
        figure.update_xaxes(dtick=1)
    figure.update_layout(showlegend=True, uirevision="training")  # a zoom survives the next point
    return figure


def smoothed(points: Sequence[tuple[int, float]], span: int) -> list[tuple[int, float]]:
    """Exponential moving average of (step, value) points, corrected for its start, as Adam's moments are (Kingma and Ba,
    2015). The newest of `span` values has the weight 2 / (span + 1)."""
    keep, mean, weight = 1 - 2 / (span + 1), 0.0, 0.0
    averages = []
    for step, value in points:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        averages.append((step, mean / weight))
    return averages


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most MOST_POINTS of them, evenly, the last one included."""
    if len(points) <= MOST_POINTS:
        return points
    stride = -(-len(points) // MOST_POINTS)
    return [*points[:-1:stride], points[-1]]


def token_lengths(tokens: TokenStatistics, max_length: int) -> Figure:
    """How many samples (y) have up to so many tokens (x); the dashed line is where samples are cut."""
    import plotly.graph_objects as go

    figure, start = go.Figure(), 0
    lefts, widths, counts, ranges = [], [], [], []
    for upto, samples in tokens.histogram:
        lefts.append(start)
        widths.append(max(1, upto - start))
        counts.append(samples)
        ranges.append(f"{start + 1:,} to {upto:,}")
        start = upto
    if counts:
        figure.add_bar(
            x=lefts, y=counts, width=widths, offset=0, showlegend=False, customdata=ranges,
            marker={"color": NEUTRAL, "line": {"width": 1, "color": "rgba(255,255,255,0.6)"}},
            hovertemplate="%{customdata} tokens: %{y} samples<extra></extra>",
        )  # fmt: skip
    if max_length <= 1.5 * max(start, 1):
        figure.add_vline(
            x=max_length, line={"dash": "dash", "width": 1.5, "color": EVAL},
            annotation_text="cut here", annotation_font={"size": 11, "color": TEXT}, annotation_position="top",
        )  # fmt: skip
    apply_layout(figure, "tokens of a sample", "samples", height=200)
    figure.update_yaxes(tickformat=",d")
    return figure


def evaluation_bars(evaluation: Evaluation, named: dict[str, str] | None = None) -> Figure:
    """Loss on the held-out samples in nats, two bars per variant: without the adapter (hatched) and with it (plain).

    named: variant → its colour on the page.
    """
    import plotly.graph_objects as go

    named = named or colours((row.variant for row in evaluation.rows), None)
    variants = list(dict.fromkeys(row.variant for row in evaluation.rows))[::-1]  # the first on top
    losses = {
        (row.variant, row.adapter is not None): row.loss for row in evaluation.rows if row.loss is not None
    }
    figure = go.Figure()
    for adapted, label, pattern in ((True, "with the adapter", ""), (False, "without", "/")):
        figure.add_bar(
            y=variants, x=[losses.get((v, adapted)) for v in variants], orientation="h", name=label, showlegend=False,
            marker=filled([named[v] for v in variants], pattern), offsetgroup=label, legendgroup=label,
            hovertemplate="%{x:.4f} nats " + label + "<extra>%{y}</extra>",
        )  # fmt: skip
    for label, pattern in (("without", "/"), ("with the adapter", "")):
        figure.add_bar(y=[None], x=[None], orientation="h", name=label, marker=filled(NEUTRAL, pattern))
    figure.update_layout(barmode="group", bargap=0.35)
    return apply_layout(
        figure, "loss on held-out samples, nats", None, height_for(len(variants)) + 20, better=("lower", None)
    )
