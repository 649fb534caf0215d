"""The pictures of a training: what they hold, on plain data."""

from __future__ import annotations

import pytest

from comparator.reporting.plots import training
from comparator.training.types import EvalRow, Evaluation, LossPoint, TokenStatistics


def test_the_loss_curve_has_what_was_measured_and_keeps_its_scale():
    curve = [LossPoint(0, eval_loss=4.2), LossPoint(1, loss=4.0), LossPoint(2, loss=3.0, eval_loss=3.5)]
    loss, held = training.loss_curve(curve, of=6).data
    assert (list(loss.x), list(loss.y)) == ([1, 2], [4.0, 3.0])
    assert (list(held.x), list(held.y)) == ([0, 2], [4.2, 3.5])
    assert held.line.dash and held.marker.symbol != "circle", "told apart by more than colour"
    first = training.loss_curve(curve[:2], of=6).layout.xaxis.range
    assert first == training.loss_curve(curve, of=6).layout.xaxis.range, "the axis must not move as it grows"
    assert not training.loss_curve(()).data


def test_a_long_curve_is_thinned_and_keeps_its_last_point():
    curve = [LossPoint(n, loss=1 / n) for n in range(1, 10_001)]
    loss, smooth = training.loss_curve(curve).data
    assert len(loss.x) <= training.MOST_POINTS + 1 and len(smooth.x) == len(loss.x)
    assert (loss.x[-1], loss.y[-1]) == (10_000, 1 / 10_000)
    assert list(loss.x) == sorted(set(loss.x))


def test_a_smoothed_loss_starts_at_the_first_and_averages_over_the_span():
    points = [(n, 3.0 if n % 2 else 1.0) for n in range(200)]
    averages = training.smoothed(points, 20)
    assert averages[0] == (0, 1.0), "no bias towards 0"
    assert averages[1][1] == pytest.approx((0.9047619 * 1 + 3) / 1.9047619), "the newest counts most"
    assert all(abs(value - 2) < 0.11 for _, value in averages[60:])


def test_the_learning_rate_has_an_axis_of_its_own():
    curve = [LossPoint(n, loss=4 - n, learning_rate=1e-4 * n) for n in range(1, 4)]
    figure = training.loss_curve(curve)
    rate = figure.data[-1]
    assert (rate.name, rate.yaxis, list(rate.y)) == ("learning rate", "y2", [1e-4 * n for n in range(1, 4)])
    assert figure.layout.yaxis2.side == "right"


def statistics(histogram, maximum=90) -> TokenStatistics:
    return TokenStatistics(10, 500, 250, 5, 50, 50.0, 80, maximum, 0, 0, 0, histogram)


def test_lengths_are_bars_as_wide_as_they_mean_and_the_cut_is_marked():
    figure = training.token_lengths(statistics(((32, 1), (64, 6), (128, 3))), 100)
    (bars,) = figure.data
    assert list(bars.x) == [0, 32, 64] and list(bars.width) == [32, 32, 64] and list(bars.y) == [1, 6, 3]
    assert figure.layout.shapes[0].x0 == 100
    assert not training.token_lengths(statistics(((32, 1),)), 4096).layout.shapes, "far off the picture"
    assert not training.token_lengths(statistics(()), 100).data


def test_variants_stand_in_pairs_in_their_own_colour():
    rows = [
        EvalRow(variant, adapter, loss, 2.0)
        for variant, losses in {"bf16": (4.0, 3.0), "nf4": (4.5, None)}.items()
        for adapter, loss in zip((None, "sailor"), losses, strict=True)
    ]
    figure = training.evaluation_bars(
        Evaluation("", "nf4", tuple(rows)), {"bf16": "#111111", "nf4": "#222222"}
    )
    worn, bare = figure.data[:2]
    assert list(bare.y) == ["nf4", "bf16"], "the first on top"
    assert list(bare.x) == [4.5, 4.0] and list(worn.x) == [None, 3.0], "what failed has no bar"
    assert list(bare.marker.color) == list(worn.marker.color) == ["#222222", "#111111"]
    assert bare.marker.pattern.shape != worn.marker.pattern.shape, "told apart by more than colour"
