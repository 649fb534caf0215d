"""Comparison → Plotly figures: what they plot, in which colours; and that nothing heavy is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sample

from comparator.core.variant import CellName
from comparator.reporting.plots import latency, memory, style

ROOT = Path(style.__file__).parents[2]


def test_the_reference_is_neutral_and_nothing_shares_a_colour():
    named = style.colours(["nf4", "bf16", "int8", "fp4", "nf4:dq", "fp16", "fp32", "gptq"], "bf16")
    assert named["bf16"] == style.NEUTRAL
    assert len(set(named.values())) == 8, "eight columns, eight colours"
    assert named["nf4"] == style.PALETTE[0] and named["int8"] == style.PALETTE[1]


def test_a_variant_keeps_its_colour_with_an_adapter():
    named = style.comparison_colours(sample.comparison())
    assert set(named) == {"bf16", "nf4", "int8:threshold=0"}


def test_page_and_plots_agree_on_the_palette():
    script = (ROOT / "ui" / "page.js").read_text()
    listed = re.search(r"PALETTE = \[(.*?)\]", script, re.S)[1]
    assert tuple(re.findall(r"#[0-9a-f]{6}", listed)) == style.PALETTE
    assert re.search(r'NEUTRAL = "(#[0-9a-f]{6})"', script)[1] == style.NEUTRAL


def test_timeline_starts_at_the_first_token_and_counts_every_one():
    figure = latency.token_timeline(sample.comparison())
    line = figure.data[0]
    assert line.x[0] == pytest.approx(0.2125) and list(line.y) == list(range(1, 9))
    assert line.x[-1] == pytest.approx(0.2125 + sum(sample.REFERENCE.latency.itl_s))
    assert [trace.name for trace in figure.data] == ["bf16", "nf4", "nf4 + pirate*0.5"]
    assert figure.data[1].line.dash == "solid" and figure.data[2].line.dash == "dot"


def test_boxes_hold_every_gap_in_milliseconds():
    figure = latency.inter_token_box(sample.comparison())
    assert figure.data[-1].name == "bf16", "the first column is on top"
    assert list(figure.data[-1].x) == pytest.approx([1e3 * gap for gap in sample.REFERENCE.latency.itl_s])


def test_bars_add_up_to_what_was_measured():
    figure = memory.memory_bars(sample.comparison())
    bars = {t.name: t for t in figure.data if t.type == "bar" and t.x[0] is not None}
    place = list(bars["weights"].y).index("nf4")
    assert bars["weights"].x[place] + bars["quant state"].x[place] == pytest.approx(
        (sample.NF4.memory.weight_bytes + sample.NF4.memory.quant_state_bytes) / 1e6
    )
    peak = next(t for t in figure.data if t.name == "peak while running")
    assert peak.x[place] == pytest.approx(9.0)


@pytest.mark.parametrize("draw", [latency.token_timeline, latency.inter_token_box, memory.memory_bars])
def test_figures_survive_columns_without_figures(draw):
    empty = replace(sample.FAILED, status="stopped", error=None)
    comparison = sample.comparison(cells=(sample.FAILED, empty), reference=CellName("bf16"))
    json.loads(draw(comparison).to_json())


@pytest.mark.parametrize("draw", [latency.token_timeline, latency.inter_token_box, memory.memory_bars])
def test_figures_have_no_background_of_their_own(draw):
    layout = draw(sample.comparison()).layout
    assert layout.paper_bgcolor == layout.plot_bgcolor == "rgba(0,0,0,0)"


def test_importing_plots_is_light():
    code = "import sys, comparator.reporting.plots.style; print([m for m in ('torch', 'plotly', 'gradio', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
