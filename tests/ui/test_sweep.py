"""The sweep of the Capacity tab: the real engine behind the page's own handler, a visitor's limits, and once in a browser."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from comparator.core.settings import Settings
from comparator.engines import get_engine

pytest.importorskip("gradio")

from comparator.ui.admission import Admission
from comparator.ui.page import Page
from comparator.ui.tabs import sweep

ASKER = SimpleNamespace(session_hash="somebody", headers={}, client=None)


def page_of(tmp_path, **settings) -> Page:
    chosen = Settings(data_dir=tmp_path, **settings)
    return Page(chosen, Admission(chosen))


def pressed(
    page: Page,
    model: object,
    *,
    on=("nf4", "bf16"),
    batch="1,2",
    context="16",
    new="4",
    ttft="",
    itl="",
    then=lambda values: None,
) -> list:
    """Everything that Measure sends to the page; `then` sees each as it comes."""
    form = (str(model), (), {"on": list(on), "reference": "bf16"}, batch, context, new, ttft, itl)

    async def everything() -> list:
        sent = []
        async for values in sweep.stream(page, form, ASKER):
            sent.append(values)
            then(values)
        return sent

    with ThreadPoolExecutor(1) as thread:  # the browser tests' Playwright keeps a loop in this one
        return thread.submit(asyncio.run, asyncio.wait_for(everything(), 300)).result()


def test_curves_table_and_files(two_layers, tmp_path):
    page = page_of(tmp_path)
    sent = pressed(page, two_layers, ttft="100s", itl="100s")
    line, start, stop, rows, files, pictures, *figures, swept = sent[-1]
    assert "Done after" in line and (start.interactive, stop.interactive) == (True, False)
    assert files.visible and pictures.visible and rows.count("<tr>") == 5
    assert "bf16 is faster" in rows or "nf4 is faster" in rows or "No difference between bf16 and nf4" in rows
    total, each, *_, peak = figures
    assert [trace.name for trace in peak.data] == ["bf16", "nf4"], "the reference is not the first"
    for figure in figures:
        assert all(list(trace.x) == [1, 2] and min(trace.y) > 0 for trace in figure.data)
    assert (
        "nf4: at least 95 % of the requests meet TTFT ≤ 100 s and ITL ≤ 100 s up to batch 2." in rows
        and "Good %" in rows
    )
    assert total.data[0].y[1] == pytest.approx(2 * each.data[0].y[1])
    saved = {
        ending: sweep.write(swept, ending, tmp_path / "files").read_text() for ending in (".csv", ".json")
    }
    table = list(csv.DictReader(io.StringIO(saved[".csv"].removeprefix("\ufeff"))))
    assert [(r["variant"], r["batch"]) for r in table] == [
        ("bf16", "1"),
        ("bf16", "2"),
        ("nf4", "1"),
        ("nf4", "2"),
    ]
    assert len(json.loads(saved[".json"])["points"]) == 4
    assert not page.sweep_runs.going("somebody") and not get_engine().queue.busy


def test_stop_keeps_what_was_measured(two_layers, tmp_path):
    page = page_of(tmp_path)

    def then(values: list) -> None:
        if isinstance(values[3], str) and "<tr>" in values[3]:
            page.sweep_runs.stop("somebody")

    line, *_, swept = pressed(page, two_layers, on=("bf16",), batch="1,2,3,4,5,6,7,8", then=then)[-1]
    assert "Stopped after" in line and 0 < len(swept.points) < 8
    assert not get_engine().queue.busy


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"model": ""}, "No model is selected"),
        ({"model": "smollm2-135m", "on": ()}, "No variant is selected"),
        ({"model": "smollm2-135m", "batch": "many"}, "not a number"),
        ({"model": "smollm2-135m", "batch": "4096"}, "too large"),
        ({"model": "smollm2-135m", "context": ""}, "at least one batch size and one context"),
        ({"model": "smollm2-135m", "itl": "soon"}, "is not a time"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(tmp_path, fields, said):
    (only,) = pressed(page_of(tmp_path), fields.pop("model"), **fields)
    assert said in only[0] and "bad" in only[0] and only[1].interactive


def test_a_public_server_bounds_the_work_of_a_visitor(tmp_path):
    page = page_of(tmp_path, public=True, requests_per_minute=1)
    for fields, setting in (
        ({"context": "8k", "batch": "16"}, "MAX_EVALUATION_TOKENS"),
        ({"batch": "64", "new": "256"}, "MAX_TOKENS_PER_COMPARISON"),
    ):
        assert f"COMPARATOR_{setting}" in pressed(page, "smollm2-135m", **fields)[-1][0]
    assert "not accepted as a model" in pressed(page, "/etc")[-1][0]
    page.admission.count(ASKER)
    assert "COMPARATOR_REQUESTS_PER_MINUTE" in pressed(page, "smollm2-135m")[-1][0]


def test_the_time_of_a_visitor_is_bounded(two_layers, tmp_path):
    page = page_of(tmp_path, max_comparison_s=1)
    line = pressed(page, two_layers, on=("bf16",), context="64", batch=",".join(map(str, range(1, 200))))[-1][
        0
    ]
    assert "Stopped" in line, "a sweep may keep the device for longer than a comparison"


@pytest.mark.browser
def test_on_the_page(visitor):
    from page_checks import sideways, violations

    visitor.tab("Capacity")
    page = visitor.page
    for field, value in (("batch", "1,2"), ("context", "16"), ("new-tokens", "4")):
        page.locator(f"#sweep-{field} :is(input, textarea)").fill(value)
    page.click("#sweep-run")
    page.wait_for_function(
        "() => /Done after/.test(document.querySelector('#sweep-said').innerText)", timeout=300_000
    )
    page.wait_for_selector("#sweep-plots .js-plotly-plot >> nth=5")
    assert page.locator("#sweep-table tbody tr").count() == 6
    with page.expect_download() as event:
        page.click("#sweep-csv")
    assert event.value.suggested_filename == "quant-comparator-sweep.csv"
    assert (
        not violations(page, "#sweep-plots") and not violations(page, "#sweep-table") and not sideways(page)
    )
    assert not visitor.complaints
