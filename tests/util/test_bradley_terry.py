"""Win rates: the fit against scipy's, the interval against simulated votes, and the cases without a finite strength."""

from __future__ import annotations

import numpy as np
import pytest

from comparator.util import bradley_terry, stats


def simulated(
    strengths: np.ndarray, votes: int, chance: np.random.Generator, ties: float = 0.2
) -> np.ndarray:
    """`wins[i][j]` of votes on random pairs, a share of them ties."""
    wins = np.zeros((len(strengths), len(strengths)))
    for _ in range(votes):
        i, j = chance.choice(len(strengths), 2, replace=False)
        if chance.random() < ties:
            wins[i, j] += 0.5
            wins[j, i] += 0.5
        elif chance.random() < 1 / (1 + np.exp(strengths[j] - strengths[i])):
            wins[i, j] += 1
        else:
            wins[j, i] += 1
    return wins


def test_the_fit_is_the_maximum_that_scipy_finds():
    optimize = pytest.importorskip("scipy.optimize")
    wins = simulated(np.array([0.8, 0.3, 0.0, -1.1]), 120, np.random.default_rng(3))
    padded = wins + bradley_terry.PRIOR / 2 / 3 * (1 - np.eye(4))

    def loss(free: np.ndarray) -> float:
        theta = np.append(free, 0.0)
        return float((padded * np.logaddexp(0, theta[None, :] - theta[:, None])).sum())

    best = optimize.minimize(loss, np.zeros(3), method="BFGS", options={"gtol": 1e-9})
    strengths, covariance = bradley_terry.fit(wins)
    assert strengths - strengths[-1] == pytest.approx(np.append(best.x, 0.0), abs=1e-5)
    differences = np.hstack([np.eye(3), -np.ones((3, 1))])  # of the first three from the last
    information = np.array([[_curvature(loss, best.x, i, j) for j in range(3)] for i in range(3)])
    assert differences @ covariance @ differences.T == pytest.approx(np.linalg.inv(information), rel=1e-3)


def _curvature(function, at: np.ndarray, i: int, j: int, step: float = 1e-3) -> float:
    a, b = np.eye(len(at))[i] * step, np.eye(len(at))[j] * step
    return (
        function(at + a + b) - function(at + a - b) - function(at - a + b) + function(at - a - b)
    ) / (4 * step * step)  # fmt: skip


def test_the_interval_holds_the_true_rate_about_as_often_as_it_says():
    truth = np.array([0.7, 0.2, -0.1, -0.8])
    p = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    shares = (p.sum(1) - 0.5) / 3
    chance, inside, total = np.random.default_rng(20), 0, 0
    for _ in range(150):
        for rate, share in zip(
            bradley_terry.win_rates(simulated(truth, 60, chance, ties=0)), shares, strict=True
        ):
            inside, total = inside + (rate.low <= share <= rate.high), total + 1
    assert 0.93 <= inside / total <= 0.985


def test_two_columns_have_their_plain_share_and_wilsons_interval():
    one, other = bradley_terry.win_rates([[0, 7.5], [2.5, 0]])
    assert (one.share, other.share) == (0.75, 0.25)
    assert (one.low, one.high) == stats.wilson(7.5, 10) and (other.low, other.high) == stats.wilson(2.5, 10)


def test_an_item_that_always_won_has_a_rate_below_one_and_a_wide_interval():
    best, middle, worst = bradley_terry.win_rates([[0, 3, 3], [0, 0, 3], [0, 0, 0]])
    assert 0.8 < best.share < 1 and best.low < 0.75 and best.high < 1
    assert middle.share == pytest.approx(0.5) and worst.share == pytest.approx(1 - best.share)


def test_whom_an_item_met_does_not_decide_its_rate():
    # 0 and 1 are equals, and so are 2 and 3; but 0 met the weak pair alone, and 1 the strong one.
    rates = bradley_terry.win_rates([[0, 8, 16, 0], [8, 0, 0, 0], [4, 0, 0, 8], [0, 0, 8, 0]])
    assert rates[0].share == pytest.approx(rates[1].share, abs=0.06)
    assert rates[1].share > 0.6, "half of its votes won, all against a strong column"


def test_an_item_without_a_vote_has_none_and_changes_no_other():
    without = bradley_terry.win_rates([[0, 2, 1], [1, 0, 2], [1, 1, 0]])
    more = bradley_terry.win_rates([[0, 2, 0, 1], [1, 0, 0, 2], [0, 0, 0, 0], [1, 1, 0, 0]])
    assert more[2] is None and [r for r in more if r] == without
    assert bradley_terry.win_rates([[0, 0], [0, 0]]) == [None, None]


def test_groups_that_never_met_are_not_told_apart():
    rates = bradley_terry.win_rates([[0, 5, 0, 0], [5, 0, 0, 0], [0, 0, 0, 5], [0, 0, 5, 0]])
    assert all(rate.low < 0.35 and rate.high > 0.65 for rate in rates)
