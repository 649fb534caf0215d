"""Win rates from paired comparisons: the Bradley–Terry model, P(i beats j) = 1 / (1 + exp(θj − θi)).

R. A. Bradley and M. E. Terry, "Rank analysis of incomplete block designs", Biometrika 39 (1952). A tie is half a win for
each side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from comparator.util import stats

PRIOR = 1.0  # ties that each item is given, spread over all others
_Z = 1.959964  # 95 %
_ROUNDS, _CLOSE = 100, 1e-10


@dataclass(frozen=True)
class Rate:
    """Expected share of comparisons won against another item taken at random, and its 95 % interval."""

    share: float
    low: float
    high: float


def win_rates(wins: Sequence[Sequence[float]]) -> list[Rate | None]:
    """Of every item; None for one that was never compared.

    wins: `wins[i][j]` comparisons that i won against j, ties as half. Of two items the share is the plain one, with
    Wilson's interval. From three on it follows from the fitted strengths; its interval is the delta method's on the log
    odds of the share. Comparisons count as independent, and a tie as much as a decision, so ties make it wider than it need be.
    """
    compared = [i for i in range(len(wins)) if any(wins[i]) or any(row[i] for row in wins)]
    table = [[float(wins[i][j]) for j in compared] for i in compared]
    rates: list[Rate | None] = [None] * len(wins)
    if len(compared) == 2:
        total = table[0][1] + table[1][0]
        for i, won in zip(compared, (table[0][1], table[1][0]), strict=True):
            rates[i] = Rate(won / total, *stats.wilson(won, total))
    elif compared:
        for i, rate in zip(compared, _fitted_rates(table), strict=True):
            rates[i] = rate
    return rates


def fit(wins: Sequence[Sequence[float]], prior: float = PRIOR):
    """(strengths θ of mean 0, shape (n,); their covariance, shape (n, n)) as numpy arrays.

    Newton's method on the likelihood with `prior` more ties per item, spread over all others: without them an item that
    won every time has no finite strength. The covariance is the inverse of the observed information, on differences of θ.
    """
    import numpy as np

    wins = np.array(wins, dtype=float)
    count = len(wins)
    wins = wins + prior / 2 / (count - 1) * (1 - np.eye(count))
    games = wins + wins.T

    def likelihood(strengths) -> float:
        return -float((wins * np.logaddexp(0, strengths[None, :] - strengths[:, None])).sum())

    def chances(strengths):
        return 1 / (1 + np.exp(strengths[None, :] - strengths[:, None]))

    def covariance(strengths):
        p = chances(strengths)
        weights = games * p * (1 - p)
        np.fill_diagonal(weights, 0)
        return np.linalg.pinv(np.diag(weights.sum(1)) - weights)

    strengths, best = np.zeros(count), likelihood(np.zeros(count))
    for _ in range(_ROUNDS):
        step = covariance(strengths) @ (wins - games * chances(strengths)).sum(1)
        while likelihood(strengths + step) < best and abs(step).max() > _CLOSE:
            step /= 2
        strengths, best = strengths + step, likelihood(strengths + step)
        if abs(step).max() < _CLOSE:
            break
    return strengths - strengths.mean(), covariance(strengths)


def _fitted_rates(wins: Sequence[Sequence[float]]) -> list[Rate]:
    import numpy as np

    strengths, covariance = fit(wins)
    rates, count = [], len(strengths)
    for i in range(count):
        p = 1 / (1 + np.exp(strengths - strengths[i]))
        p[i] = 0
        share = float(p.sum()) / (count - 1)
        slope = -p * (1 - p) / (count - 1)  # of the share, by each strength
        slope[i] = -slope.sum()
        middle, error = math.log(share / (1 - share)), math.sqrt(float(slope @ covariance @ slope))
        half = _Z * error / (share * (1 - share))
        rates.append(Rate(share, _logistic(middle - half), _logistic(middle + half)))
    return rates


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0
