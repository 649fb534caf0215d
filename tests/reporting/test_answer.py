"""The chart beside the recommendation: what is drawn, and that no label covers another."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
import sample

from comparator.core.result import CellResult, Latency, Memory
from comparator.reporting import answer
from comparator.reporting.answer import Bubble, chart, pareto, place_labels
from comparator.reporting.plots.labels import LETTER, LINE, Box, overlap


def label_box(bubble: Bubble) -> Box:
    half = LETTER * len(bubble.label) / 2
    return (bubble.text_x - half, bubble.text_y + 3 - LINE, bubble.text_x + half, bubble.text_y + 3)


@pytest.mark.parametrize("seed", range(20))
def test_no_label_covers_another_or_a_bubble(seed: int):
    """Eight columns anywhere, and eight that lie close together, which variants of one size do."""
    draw = random.Random(seed)
    width = 420 if seed % 2 else 60
    bubbles = [
        Bubble(f"method{i}:g128", "#000", 60 + width * draw.random(), 40 + 180 * draw.random(), 6 + 8 * draw.random(), "", False, True)
        for i in range(8)
    ]  # fmt: skip
    place_labels(bubbles)
    for number, bubble in enumerate(bubbles):
        box = label_box(bubble)
        assert box[0] >= 0 and box[2] <= answer.WIDTH, f"{bubble.label} is cut off"
        for other in bubbles[number + 1 :]:
            assert not overlap(box, label_box(other)), f"{bubble.label} covers {other.label}"


def test_the_front_is_what_no_other_beats():
    assert pareto([(100, 10), (200, 20), (150, 5), (300, 20)]) == [(100, 10), (200, 20)]


def column(name: str, megabytes: float, speed: float | None) -> CellResult:
    return CellResult(
        name, memory=Memory(resident_bytes=int(megabytes * 1e6)), latency=Latency(decode_tok_s=speed)
    )


def test_a_chart_needs_two_columns_with_both_figures():
    assert chart([column("bf16", 270, 10.0)], None) is None
    assert chart([column("bf16", 270, 10.0), column("nf4", 115, None)], None) is None
    drawn = chart([column("bf16", 270, 10.0), column("nf4", 115, 14.0)], None)
    inside = [
        b
        for b in drawn["bubbles"]
        if drawn["left"] <= b.x <= drawn["right"] and drawn["top"] <= b.y <= drawn["bottom"]
    ]
    assert len(inside) == 2 and drawn["x_ticks"][0][1] == "0" and len(drawn["x_ticks"]) >= 4


def test_text_from_a_document_is_escaped_and_a_long_label_shortened():
    whole = sample.comparison()
    evil = "gptq@/some/very/long/folder/<script>alert(1)</script>/checkpoint"
    cells = [replace(c, variant=evil) if c.variant == "nf4" else c for c in whole.cells]
    html = answer.render(cells, whole.cells[0])
    assert "<script" not in html and "&lt;" in html
    assert max(map(len, re.findall(r'class="name"[^>]*>([^<]*)<', html))) <= 40


def test_the_chart_is_described_for_who_cannot_see_it():
    whole = sample.comparison()
    html = answer.render(whole.cells, whole.cells[0])
    label = re.search(r'role="img" aria-label="([^"]*)"', html)[1]
    assert "bf16: " in label and "the reference" in label and "KL divergence 0.321 nats" in label
