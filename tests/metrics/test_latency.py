"""Latency figures from timestamps: plain arithmetic, and None where nothing is defined."""

from __future__ import annotations

import random

import pytest

from comparator.core.result import Interference
from comparator.metrics.latency import aggregate, from_timestamps
from comparator.util.stats import differ, percentile


def test_figures_of_a_run():
    figures = from_timestamps(10.0, [10.5, 10.6, 10.8, 11.0], prompt_tokens=20)
    assert figures.ttft_s == pytest.approx(0.5)
    assert figures.prefill_tok_s == pytest.approx(40)
    assert figures.itl_s == pytest.approx((0.1, 0.2, 0.2))
    assert figures.decode_tok_s == pytest.approx(3 / 0.5), "decode rate is (n − 1) over first to last token"
    assert figures.itl_p50_s == pytest.approx(0.2)
    assert figures.total_s == pytest.approx(1.0)


@pytest.mark.parametrize("times", [[], [1.0]])
def test_undefined_is_none(times):
    figures = from_timestamps(0.0, times, 5)
    assert figures.decode_tok_s is None and figures.itl_p50_s is None and figures.itl_s == ()
    assert (figures.ttft_s is None) == (not times)


def test_percentiles_interpolate():
    assert percentile([1, 2, 3, 4], 50) == 2.5
    assert percentile([5], 99) == 5
    assert percentile([], 50) is None


def test_medians_over_repeats_keep_every_run():
    runs = [from_timestamps(0, [1, 1 + 1 / rate], 4) for rate in (10, 30, 20)]
    together = aggregate(runs)
    assert together.decode_tok_s == pytest.approx(20)
    assert [r.decode_tok_s for r in together.runs] == pytest.approx([10, 30, 20])


def test_a_difference_needs_runs_that_carry_it():
    assert differ([10, 10.2, 10.1], [12, 12.2, 12.1])
    assert not differ([10, 12, 11], [11, 13, 12]), "the ranges overlap"
    assert not differ([10.0, 10.4, 10.2], [10.5, 10.9, 10.7]), (
        "ranges that just part are chance in one of ten pairs"
    )
    assert not differ([10], [20]) and not differ([10, 10], [20, 20]), "too few runs for a verdict"


def test_three_runs_of_one_distribution_are_hardly_ever_called_different():
    draw = random.Random(0)
    pairs = [[[draw.gauss(20, 1) for _ in range(3)] for _ in range(2)] for _ in range(2000)]
    assert sum(differ(a, b) for a, b in pairs) / len(pairs) < 0.025


def test_disturbed_runs_are_left_out_where_there_are_others():
    calm = [from_timestamps(0, [1, 1 + 1 / rate], 4, Interference()) for rate in (20, 30)]
    slowed = from_timestamps(0, [1, 1 + 1 / 5], 4, Interference("a busy process"))
    together = aggregate([calm[0], slowed, calm[1]])
    assert together.decode_tok_s == pytest.approx(25) and len(together.runs) == 3
    assert aggregate([slowed]).decode_tok_s == pytest.approx(5), "a disturbed run is better than none"
