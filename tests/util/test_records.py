"""Dataclasses from JSON: nested, with tuples, and nothing of a wrong type."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from comparator.util.records import record


@dataclass(frozen=True)
class Point:
    step: int
    loss: float | None = None


@dataclass(frozen=True)
class Curve:
    name: str
    points: tuple[Point, ...] = ()


def test_a_nested_record_is_read_and_unknown_keys_are_passed_over():
    saved = {"name": "a", "points": [{"step": 1, "loss": 0.5, "mood": "good"}, {"step": 2}], "newer": True}
    assert record(Curve, saved) == Curve("a", (Point(1, 0.5), Point(2)))


@pytest.mark.parametrize(
    "saved",
    [None, [], {}, {"name": 7}, {"name": "a", "points": [1]}, {"name": "a", "points": [{"step": "x"}]}],
)
def test_a_wrong_type_is_refused(saved):
    with pytest.raises(ValueError):
        record(Curve, saved)
