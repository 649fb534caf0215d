"""Latency figures from timestamps: plain arithmetic, and None where nothing is defined."""

from __future__ import annotations

import pytest

from comparator.metrics.latency import cannot_tell, from_timestamps, median_of, percentile


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
    together = median_of(runs)
    assert together.decode_tok_s == pytest.approx(20)
    assert [r.decode_tok_s for r in together.runs] == pytest.approx([10, 30, 20])


def test_a_difference_within_the_spread_is_not_a_difference():
    assert cannot_tell([10, 12], [11, 13])
    assert not cannot_tell([10, 11], [12, 13])
    assert cannot_tell([10], [20]), "one run each has no spread, so no verdict"
