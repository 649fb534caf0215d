"""Intervals and tests against scipy."""

from __future__ import annotations

import pytest

from comparator.util import stats


@pytest.mark.parametrize(("successes", "count"), [(0, 5), (3, 5), (39, 40), (40, 40), (500, 1000)])
def test_wilson(successes: int, count: int) -> None:
    scipy = pytest.importorskip("scipy.stats")
    expected = scipy.binomtest(successes, count).proportion_ci(0.95, "wilson")
    assert stats.wilson(successes, count) == pytest.approx((expected.low, expected.high), abs=1e-7)


@pytest.mark.parametrize(("one", "other"), [(1, 0), (5, 1), (3, 3), (0, 9), (40, 20)])
def test_mcnemar(one: int, other: int) -> None:
    scipy = pytest.importorskip("scipy.stats")
    assert stats.mcnemar(one, other) == pytest.approx(scipy.binomtest(one, one + other).pvalue)


def test_mcnemar_without_a_flip() -> None:
    assert stats.mcnemar(0, 0) == 1.0


def test_clustered() -> None:
    scipy = pytest.importorskip("scipy.stats")
    values, weights = [0.1, 0.4, 0.2, 0.9, 0.3], [10, 4, 7, 1, 10]
    plain = stats.clustered(values)
    assert plain is not None and plain.se == pytest.approx(scipy.sem(values))
    weighted = stats.clustered(values, weights)
    assert weighted is not None and weighted.mean == pytest.approx(
        sum(v * w for v, w in zip(values, weights, strict=True)) / 32
    )
    assert stats.clustered([]) is None and stats.clustered([1.0]) == stats.Mean(1.0, None)


def test_cohen_kappa() -> None:
    # The example of Cohen's kappa in Fleiss' textbook form: 20 both yes, 15 both no, 5 and 10 apart.
    pairs = [("y", "y")] * 20 + [("n", "n")] * 15 + [("y", "n")] * 5 + [("n", "y")] * 10
    assert stats.cohen_kappa(pairs) == pytest.approx(0.4)
    assert stats.cohen_kappa([]) is None and stats.cohen_kappa([("y", "y")]) is None
    assert stats.cohen_kappa([("y", "n"), ("n", "y")]) == pytest.approx(-1)
