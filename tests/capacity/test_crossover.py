"""The crossover in words: only what repeats carry, and nothing claimed between two measured batches."""

from __future__ import annotations

import pytest

from comparator.capacity.crossover import sentence, sentences
from comparator.capacity.points import Point


def runs(**rates: float) -> dict[int, tuple[float, ...]]:
    """`b8=100`: batch 8 at about 100 tok/s, three repeats 1 % apart."""
    return {int(name[1:]): (rate * 0.99, rate, rate * 1.01) for name, rate in rates.items()}


@pytest.mark.parametrize(
    ("bf16", "nf4", "said"),
    [
        (
            runs(b1=10, b8=60, b12=130, b16=160),
            runs(b1=20, b8=90, b12=100, b16=110),
            "From batch 12 on bf16 is faster than nf4, which is faster up to batch 8: they cross between batch 8 and 12.",
        ),
        (
            runs(b1=10, b4=40, b16=160),
            runs(b1=20, b4=40.1, b16=110),
            "From batch 16 on bf16 is faster than nf4, which is faster up to batch 1: they cross between batch 1 and 16. "
            "At batch 4 the difference is within the noise.",
        ),
        (runs(b1=10, b4=40), runs(b1=5, b4=20, b8=30), "bf16 is faster than nf4 at batch 1 and 4."),
        (
            runs(b1=10, b4=40),
            runs(b1=10.01, b4=40.02),
            "No difference between bf16 and nf4 is larger than the noise of the runs, at batch 1 and 4.",
        ),
        (
            runs(b1=10, b4=20, b8=40),
            runs(b1=5, b4=40, b8=20),
            "Of bf16 and nf4 which one is faster changes more than once: bf16 at 1, nf4 at 4 and bf16 at 8.",
        ),
        ({1: (10.0,)}, {1: (20.0,)}, "bf16 and nf4: at least 3 repeats are needed to tell which is faster."),
        (runs(b1=10), runs(b2=10), ""),
    ],
)
def test_where_two_variants_cross(bf16, nf4, said: str) -> None:
    assert sentence("bf16", bf16, "nf4", nf4) == said


def test_each_context_is_told_apart_and_failed_points_do_not_count() -> None:
    points = [
        Point(variant, batch, context, runs=tuple(rate * batch * x for x in (0.99, 1.0, 1.01)))
        for variant, rate in (("bf16", 10.0), ("int8", 5.0))
        for batch in (1, 4)
        for context in (512, 2048)
    ]
    points += [Point("int8", 16, 512, error="Out of memory"), Point("nf4", 1, 512, error="cannot be loaded")]
    assert sentences(points) == [
        "Context 512: bf16 is faster than int8 at batch 1 and 4.",
        "Context 2,048: bf16 is faster than int8 at batch 1 and 4.",
    ]
    assert sentences(p for p in points if p.context == 512) == ["bf16 is faster than int8 at batch 1 and 4."]
