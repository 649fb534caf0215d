"""Where the labels of a scatter plot stand so that none covers another, at any width of the plot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]  # left, top, right, bottom; y grows downwards

LINE = 13.0  # height of a label
LETTER = 7.0  # width of one of its letters
LONGEST = 26  # letters of a label
NEAR = 14.0  # up to this distance a label needs no line to its point
_DISTANCES = (4.0, NEAR, 28.0, 46.0, 70.0, 100.0, 130.0)  # tried one after the other
_SPOTS = 16  # directions that are tried at each distance
_WORSE = 100  # a label over another cannot be read; over a point it can
_WRONG = 0.5  # of a label's area: what it costs to stand nearer to another point than to its own


@dataclass(frozen=True)
class Point:
    """A dot and its label. `at`: its centre in each of the frames; lengths in the frames' units."""

    label: str
    radius: float
    at: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Spot:
    """The middle of a label, relative to the centre of its point."""

    dx: float
    dy: float
    far: bool  # whether a line has to join both


def short(label: str, longest: int = LONGEST) -> str:
    """A label of at most `longest` letters; the path of a checkpoint keeps its end where the method leaves room for it."""
    if len(label) <= longest:
        return label
    method, at, source = label.partition("@")
    room = longest - len(method) - 2
    return f"{method}@…{source[-room:]}" if at and room > 0 else f"{label[: longest - 1]}…"


def place(points: Sequence[Point], frames: Sequence[Box]) -> list[Spot]:
    """A spot for each point's label.

    Each in turn, from the left, takes the nearest spot that is free in all frames and nearer to its point than to any other;
    where there is none, the one that covers least, with a line to its point if it is nearer to another.

    frames: the area of the plot at each width that it may be drawn at; offsets are the same in all of them.
    """
    dots = [[_around(point.at[n], point.radius) for point in points] for n in range(len(frames))]
    taken: list[list[Box]] = [[] for _ in frames]
    spots: list[Spot | None] = [None] * len(points)
    for number in sorted(range(len(points)), key=lambda n: points[n].at[0]):
        point, best, least = points[number], Spot(0.0, 0.0, False), math.inf
        others = [p for p in points if p is not point]
        for spot in _candidates(point):
            covered, wrong = 0.0, False
            for n, frame in enumerate(frames):
                box = label_box(point, spot, n)
                covered += sum(overlap(box, dot) for dot in dots[n])
                covered += _WORSE * (sum(overlap(box, other) for other in taken[n]) + _outside(box, frame))
                if any(_gap(box, p, n) < _gap(box, point, n) for p in others):
                    covered, wrong = covered + _WRONG * LINE * LETTER * len(point.label), True
                if covered >= least:
                    break
            if covered < least:
                best, least = Spot(spot.dx, spot.dy, spot.far or wrong), covered
            if not least:
                break
        spots[number] = best
        for n, labels in enumerate(taken):
            labels.append(label_box(point, best, n))
    return [spot for spot in spots if spot]


def label_box(point: Point, spot: Spot, frame: int = 0) -> Box:
    """The area of a label at a spot."""
    x, y = point.at[frame][0] + spot.dx, point.at[frame][1] + spot.dy
    half = LETTER * len(point.label) / 2
    return (x - half, y - LINE / 2, x + half, y + LINE / 2)


def overlap(one: Box, other: Box) -> float:
    """Area that two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)


def _gap(box: Box, point: Point, frame: int) -> float:
    """Distance from the edge of a dot to a label."""
    x, y = point.at[frame]
    return math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3])) - point.radius


def _candidates(point: Point) -> list[Spot]:
    """Spots around the point, from near to far; at each distance the one above first."""
    half, spots = LETTER * len(point.label) / 2, []
    for distance in _DISTANCES:
        reach = point.radius + distance
        for turn in range(_SPOTS):
            angle = math.pi / 2 + 2 * math.pi * ((turn + 1) // 2 * (-1) ** turn) / _SPOTS
            dx, dy = math.cos(angle) * (reach + half), -math.sin(angle) * (reach + LINE / 2)
            spots.append(Spot(dx, dy, distance > NEAR))
    return spots


def _around(centre: tuple[float, float], radius: float) -> Box:
    return (centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius)


def _outside(box: Box, frame: Box) -> float:
    """Area of a box that lies outside of a frame."""
    return (box[2] - box[0]) * (box[3] - box[1]) - overlap(box, frame)
