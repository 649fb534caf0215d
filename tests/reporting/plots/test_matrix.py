"""The heat map of variants × adapters, from documents: no torch, no page."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comparator.core.request import BUILTIN_MODEL, GenerationSettings
from comparator.core.result import CellResult, Comparison, Environment, ErrorInfo, Latency, PromptInfo
from comparator.metrics.definitions import METRICS
from comparator.reporting.plots import matrix


def cell(variant: str, adapter: str | None, speed: float | None, **rest) -> CellResult:
    return CellResult(variant, adapter, latency=Latency(decode_tok_s=speed, ttft_s=0.2), **rest)


@pytest.fixture
def comparison() -> Comparison:
    cells = (
        cell("bf16", "pirate", 10.0),
        cell("bf16", None, 15.0),
        cell("nf4", None, None),
        replace(
            cell("nf4", "<b>odd</b>", None), status="failed", error=ErrorInfo("It does <i>not</i> fit.", "…")
        ),
    )
    return Comparison(
        "id",
        "2026-01-01T00:00:00+00:00",
        PromptInfo("Hi"),
        GenerationSettings(),
        Environment(),
        BUILTIN_MODEL,
        None,
        cells,
    )


def test_axes_keep_the_columns_order_with_none_first(comparison):
    assert matrix.axes(comparison) == (["bf16", "nf4"], ["none", "pirate", "<b>odd</b>"])


def test_cells_hold_the_figure_and_say_what_is_missing(comparison):
    figure = matrix.heat_map(comparison, "decode_tok_s")
    heat = figure.data[0]
    assert [list(row) for row in heat.z] == [[15.0, 10.0, None], [None, None, None]]
    assert [list(row) for row in heat.text] == [["15.0", "10.0", ""], ["–", "", "failed"]]
    assert heat.customdata[0][2] == "not a column"
    written = {(note.x, note.y): note.text for note in figure.layout.annotations}
    assert written == {("none", "nf4"): "–", ("<b>odd</b>", "nf4"): "–"}, (
        "a gap must say that nothing was measured"
    )


def test_table_says_the_same(comparison):
    heads, rows = matrix.table(comparison, "decode_tok_s")
    assert heads == ["variant", "none", "pirate", "<b>odd</b>"]
    assert rows == [["bf16", "15.0", "10.0", ""], ["nf4", "–", "", "failed"]]


def test_only_metrics_that_a_column_has_can_be_chosen(comparison):
    keys = [key for _, key in matrix.choices(comparison)]
    assert keys[:2] == ["decode_tok_s", "ttft_s"]
    assert "adapter_bytes" not in keys and all(key in METRICS for key in keys)


def test_no_matrix_without_an_adapter(comparison):
    assert matrix.is_matrix(comparison)
    assert not matrix.is_matrix(replace(comparison, cells=comparison.cells[1:3]))


def test_an_error_text_brings_no_markup(comparison):
    hover = matrix.heat_map(comparison, "decode_tok_s").data[0].customdata[1][2]
    assert "<i>" not in hover
