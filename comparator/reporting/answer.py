"""The answer to "which one?" as HTML: the recommendation beside a chart of memory, speed and divergence.

The same on the page and in HTML reports. The chart is SVG without a script: it is there at once, and its labels are placed
so that none covers another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparator.core.result import CellResult
from comparator.fidelity import verdict
from comparator.metrics.definitions import METRICS
from comparator.reporting import recommendation
from comparator.reporting.plots import labels
from comparator.reporting.plots.style import colours
from comparator.reporting.prompt_set import ColumnSummary
from comparator.util import formatting
from comparator.util.templates import environment

_TEMPLATES = Path(__file__).with_name("templates")
WIDTH, HEIGHT = 520, 300  # of the chart, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 14, 42  # margins: tick labels and axis titles
_SMALLEST, _LARGEST = 6.0, 20.0  # radius of a bubble
_FRAME = (_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM)


@dataclass
class Bubble:
    """One column on the chart, in the chart's units. `radius` grows with the square root of the divergence."""

    label: str
    colour: str
    x: float
    y: float
    radius: float
    title: str
    reference: bool
    measured: bool  # whether its divergence is known, and its speed undisturbed
    text_x: float = 0.0
    text_y: float = 0.0
    leader: bool = False  # whether a line has to join it with its label


def render(
    cells: Sequence[CellResult], reference: CellResult | None, summaries: Sequence[ColumnSummary] = ()
) -> str:
    """HTML; "" where there is nothing to choose from. Arguments as of `recommendation.recommend`."""
    return draw(recommendation.recommend(cells, reference, summaries), cells, reference)


def draw(
    recommended: recommendation.Recommendation | None,
    cells: Sequence[CellResult],
    reference: CellResult | None,
) -> str:
    """`render` of what `recommendation.recommend` gave for these cells."""
    if recommended is None:
        return ""
    drawn = chart([c for c in cells if c.status == "ok"], reference)
    palette = colours((c.variant for c in cells), reference.variant if reference else None)
    return str(
        environment(_TEMPLATES)
        .get_template("answer.html")
        .render(recommended=recommended, chart=drawn, palette=palette, rule=recommendation.RULE)
    )


def chart(cells: Sequence[CellResult], reference: CellResult | None) -> dict[str, Any] | None:
    """What the template draws: bubbles, ticks, the Pareto front; None below two columns with memory and speed."""
    size, speed = METRICS["resident_bytes"], METRICS["decode_tok_s"]
    known = [(c, s / 1e6, v) for c in cells if (s := size.get(c)) and (v := speed.get(c))]
    if len(known) < 2:
        return None
    palette = colours((c.variant for c in cells), reference.variant if reference else None)
    x_ticks, y_ticks = _ticks(max(s for _, s, _ in known)), _ticks(max(v for _, _, v in known))
    across, up = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM
    losses = {c.label: kl.mean for c, _, _ in known if c is not reference and (kl := verdict.divergence(c))}
    worst = max(losses.values(), default=0.0)

    def place(megabytes: float, rate: float) -> tuple[float, float]:
        return _LEFT + across * megabytes / x_ticks[-1], _TOP + up * (1 - rate / y_ticks[-1])

    bubbles = []
    for cell, megabytes, rate in known:
        loss = losses.get(cell.label)
        share = math.sqrt(max(loss, 0.0) / worst) if loss is not None and worst > 0 else 0.0
        x, y = place(megabytes, rate)
        bubbles.append(
            Bubble(
                labels.short(cell.label), palette[cell.variant], x, y, _SMALLEST + (_LARGEST - _SMALLEST) * share,
                _title(cell, loss, cell is reference), cell is reference,
                (loss is not None or cell is reference) and not verdict.disturbed(cell),
            )
        )  # fmt: skip
    place_labels(bubbles)
    front = pareto([(s, v) for _, s, v in known])
    return {
        "bubbles": sorted(bubbles, key=lambda b: -b.radius),  # a small one is not hidden behind a large one
        "x_ticks": [(place(t, 0)[0], formatting.figure(t) if t else "0") for t in x_ticks],
        "y_ticks": [(place(0, t)[1], formatting.figure(t) if t else "0") for t in y_ticks],
        "front": " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in front)) if len(front) > 1 else "",
        "width": WIDTH, "height": HEIGHT, "left": _LEFT, "right": WIDTH - _RIGHT, "top": _TOP, "bottom": HEIGHT - _BOTTOM,
        "unit": speed.unit,
        "sized": worst > 0,
        "grey": not all(b.measured for b in bubbles),
    }  # fmt: skip


def _title(cell: CellResult, loss: float | None, is_reference: bool) -> str:
    """What is shown on hover, and read out."""
    figures = [METRICS["resident_bytes"].format(cell), METRICS["decode_tok_s"].format(cell)]
    if is_reference:
        figures.append("the reference")
    else:
        figures.append(
            "divergence not measured" if loss is None else f"KL divergence {formatting.small(loss)} nats"
        )
    if verdict.disturbed(cell):
        figures.append("speed disturbed")
    return f"{cell.label}: {', '.join(figures)}"


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (memory, speed) points those that no other beats in both, by memory."""
    best: list[tuple[float, float]] = []
    for memory, speed in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or speed > best[-1][1]:
            best.append((memory, speed))
    return best


def _ticks(largest: float) -> list[float]:
    """From 0 to at least `largest`, four to six steps of 1, 2, 2.5 or 5 × a power of ten."""
    raw = largest / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw)
    return [step * i for i in range(math.ceil(largest * 1.05 / step) + 1)]


def place_labels(bubbles: list[Bubble]) -> None:
    """Sets `text_x` and `text_y`, the middle of each label's baseline, and `leader`."""
    points = [labels.Point(b.label, b.radius, ((b.x, b.y),)) for b in bubbles]
    for bubble, spot in zip(bubbles, labels.place(points, [_FRAME]), strict=True):
        bubble.text_x, bubble.text_y = bubble.x + spot.dx, bubble.y + spot.dy + labels.LINE / 2 - 3
        bubble.leader = spot.far
