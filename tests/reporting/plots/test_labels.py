"""Labels of a scatter plot: none over another, at any width."""

from __future__ import annotations

import random

import pytest

from comparator.reporting.plots import labels
from comparator.reporting.plots.fidelity import LONGEST, WIDTHS_PX


@pytest.mark.parametrize("seed", range(8))
def test_eight_labels_never_overlap_at_any_width(seed: int):
    """Also between the widths they were placed for, and where all columns are of one size."""
    draw = random.Random(seed)
    spread = 1.0 if seed % 2 else 0.05
    shares = [(0.4 + spread * (draw.random() - 0.5), draw.random()) for _ in range(8)]
    names = [labels.short(f"gptq:{n}bit,g64@calibrated-on-my-text", LONGEST) for n in range(8)]

    def points(widths):
        return [
            labels.Point(name, 9, tuple((x * width, 328 * y) for width in widths))
            for name, (x, y) in zip(names, shares, strict=True)
        ]

    spots = labels.place(points(WIDTHS_PX), [(0, 0, width, 328) for width in WIDTHS_PX])
    for width in range(WIDTHS_PX[0], 1400, 37):
        boxes = [labels.label_box(p, s) for p, s in zip(points((width,)), spots, strict=True)]
        for n, box in enumerate(boxes):
            assert not any(labels.overlap(box, other) for other in boxes[n + 1 :]), f"{width} px: {names[n]}"


def test_a_long_name_keeps_its_method_and_the_end_of_its_path():
    assert labels.short("nf4") == "nf4"
    assert labels.short("gptq@/models/mine/llama-4bit", 20) == "gptq@…ine/llama-4bit"
    assert len(labels.short("a-method-with-a-very-long-name@somewhere", 20)) == 20


def test_a_label_nearer_to_another_point_is_joined_with_its_own_by_a_line():
    """Two points over each other: each name stands beside its own."""
    upper = labels.Point("upper", 9, ((200, 100),))
    lower = labels.Point("lower", 9, ((200, 109),))
    first, second = labels.place([lower, upper], [(0, 0, 400, 300)])
    for point, other, spot in ((lower, upper, first), (upper, lower, second)):
        box = labels.label_box(point, spot)
        assert spot.far or labels._gap(box, point, 0) <= labels._gap(box, other, 0), point.label
