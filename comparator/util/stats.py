"""Percentiles, and whether repeated runs carry a difference."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

LEAST_RUNS = 3  # of each column, for a difference in speed to be called one
SURE = 4.0  # standard errors that it must exceed


def percentile(values: Sequence[float], q: float) -> float | None:
    """Percentile `q` (0..100) with linear interpolation between ranks; None without values."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def differ(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether repeated runs of two columns carry a difference: at least LEAST_RUNS each, and means further apart than
    SURE standard errors of their difference (Welch's t).

    With three runs from one normal distribution each, that calls 1.5 % of the pairs different; ranges that do not overlap
    would call 10 %.
    """
    if min(len(a), len(b)) < LEAST_RUNS:
        return False
    error = math.sqrt(statistics.variance(a) / len(a) + statistics.variance(b) / len(b))
    return abs(statistics.fmean(a) - statistics.fmean(b)) > SURE * error


def wilson(successes: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, at 95 % by default. Raises `ZeroDivisionError` for no trial."""
    share, spread = successes / count, z * z / count
    middle = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(one: int, other: int) -> float:
    """Exact p value of McNemar's test from the two counts of discordant pairs: a two-sided binomial test with p = 1/2."""
    total, least = one + other, min(one, other)
    return min(1.0, 2 * sum(math.comb(total, k) for k in range(least + 1)) / 2**total)


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Agreement of two raters beyond chance (Cohen 1960), from the categories that each gave: 1 is full, 0 what chance
    gives. None without a pair, and where both gave one category throughout."""
    count = len(pairs)
    if not count:
        return None
    observed = sum(a == b for a, b in pairs) / count
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    expected = sum(first[c] * second[c] for c in first) / count**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


@dataclass(frozen=True)
class Mean:
    """`se`: standard error; None of a single cluster."""

    mean: float
    se: float | None


def clustered(values: Sequence[float], weights: Sequence[float] | None = None) -> Mean | None:
    """Weighted mean of clusters and its standard error (a ratio estimator's: Cochran 1977, 6.4); equal weights give the
    standard error of the mean. None without any weight."""
    weights = weights or [1.0] * len(values)
    total, count = math.fsum(weights), len(values)
    if not total:
        return None
    mean = math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total
    if count < 2:
        return Mean(mean, None)
    squares = math.fsum((w * (v - mean)) ** 2 for v, w in zip(values, weights, strict=True))
    return Mean(mean, math.sqrt(squares * count / (count - 1)) / total)
