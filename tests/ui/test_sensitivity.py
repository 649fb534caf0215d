"""Sensitivity: the real engine behind the page's own handler, its refusals, and once in a browser."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import pytest
import sample

from comparator import sources
from comparator.backends import resolve
from comparator.core.errors import UserError
from comparator.core.request import BUILTIN_MODEL
from comparator.core.settings import Settings
from comparator.core.variant import CellName
from comparator.deploy import zerogpu_runner
from comparator.engines import get_engine
from comparator.fidelity.sensitivity import Part
from comparator.reporting.plots import fidelity

pytest.importorskip("gradio")

from comparator.ui.admission import Admission
from comparator.ui.form import Shown
from comparator.ui.page import Page
from comparator.ui.tabs import recipe, sensitivity

ASKER = SimpleNamespace(session_hash="somebody", headers={}, client=None)


def page_of(tmp_path, **settings) -> Page:
    chosen = Settings(data_dir=tmp_path, **settings)
    return Page(chosen, Admission(chosen))


def shown(recorded: bool = False, **changes) -> Shown:
    return Shown(sample.comparison(**{"model": BUILTIN_MODEL, **changes}), recorded)


async def pressed(
    page: Page, what: Shown, name: str = "nf4", by: str = "kind", then=lambda line: None
) -> list:
    """Everything that Measure sends to the page; `then` sees each line as it appears."""
    sent = []
    async for values in sensitivity.stream(page, what, name, by, ASKER, tokens=16):
        sent.append(values)
        then(values[0])
    return sent


def waited(sending, timeout_s: float = 300) -> list:
    """What a coroutine gives, run in a thread of its own: the browser tests' Playwright keeps a loop in this one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, asyncio.wait_for(sending, timeout_s)).result()


def test_it_waits_for_its_turn_and_then_measures_every_part(two_layers, tmp_path):
    page, engine = page_of(tmp_path), get_engine()
    other, lines = contextlib.ExitStack(), []
    other.enter_context(engine.queue.turn(threading.Event()))  # as if a comparison ran

    def then(line: str) -> None:
        lines.append(line)
        if "1 ahead" in line:
            assert not any("alone" in earlier for earlier in lines), "it began while another had the device"
            other.close()

    with other:
        sent = waited(pressed(page, shown(model=str(two_layers)), then=then), 300)
    assert any("1 ahead" in line for line in lines), "who waits is not told how many are ahead"
    line, start, stop, _, figure, rows = sent[-1]
    assert "matters most" in line, f"the measurement did not finish: {line}"
    assert (start.interactive, stop.interactive) == (True, False)
    (bars,) = figure.data
    kinds = {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")}
    assert set(bars.y) == kinds
    assert list(bars.x) == sorted(bars.x) and bars.x[0] > 0, (
        "every part of nf4 loses something, the worst on top"
    )
    assert bars.y[-1] in line and all(kind in rows for kind in kinds)
    assert "16 tokens" in rows and 'data-key="2"' in rows, "two layers of each kind in this model"
    assert not page.sensitivity_runs.going("somebody") and not engine.queue.busy


def test_stop_while_it_waits(tmp_path):
    page, engine = page_of(tmp_path), get_engine()

    def then(line: str) -> None:
        if "1 ahead" in line:
            page.sensitivity_runs.stop("somebody")

    with engine.queue.turn(threading.Event()):
        sent = waited(pressed(page, shown(), then=then), 60)
    assert "Stopped." in sent[-1][0] and sent[-1][1].interactive
    assert not engine.queue.busy, "it stayed in line after Stop"


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bf16", {}, "not quantized.*Select nf4 instead"),
        ("no such column", {}, "not part of the comparison"),
        ("nf4", {"reference": CellName("nf4")}, "is the reference.*another variant"),
        ("nf4", {"reference": None}, "no reference"),
        ("nf4:nonsense", {"cells": (replace(sample.NF4, variant="nf4:nonsense"),)}, "no option"),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(tmp_path, name, changes, said):
    with pytest.raises(UserError, match=f"(?s){said}"):
        sensitivity.measurement_of(shown(**changes), name, "kind")
    (only,) = waited(pressed(page_of(tmp_path), shown(**changes), name))
    assert "bad" in only[0] and only[1].interactive


def test_a_recording_of_a_model_that_is_not_here(tmp_path):
    page = page_of(tmp_path)
    sent = waited(pressed(page, shown(True, model=str(tmp_path / "gone"))))
    assert "is not on this machine" in sent[-1][0] and "Run it here" in sent[-1][0]
    assert sources.is_here(BUILTIN_MODEL) and not sources.is_here("nobody-at-all/no-such-model")


def test_a_public_server_holds_the_same_limits_as_for_a_run(tmp_path):
    page = page_of(tmp_path, public=True, requests_per_minute=1)
    assert "not accepted as a model" in waited(pressed(page, shown(model="/etc")))[-1][0]
    assert "public server" in waited(pressed(page, shown(), by="module"))[-1][0]
    page.admission.count(ASKER)
    assert "COMPARATOR_REQUESTS_PER_MINUTE" in waited(pressed(page, shown()))[-1][0]
    small = page_of(tmp_path, public=True, max_model_parameters="1M")
    assert "COMPARATOR_MAX_MODEL_PARAMETERS" in waited(pressed(small, shown()))[-1][0]


def test_the_first_choice_is_the_worst_quantized_column():
    comparison = sample.comparison()
    names = [c.variant for c in comparison.cells]
    assert sensitivity.first_choice(comparison, names) == "nf4"
    assert (
        sensitivity.first_choice(comparison, ["bf16"]) == "bf16"
        and sensitivity.first_choice(comparison, []) is None
    )


def test_many_parts_are_cut_in_the_picture_and_whole_in_the_table():
    found = tuple(Part(f"layer {n}", ("a", "b"), 1 / (n + 1), None, 2.0, 0.5, 16) for n in range(40))
    (bars,) = fidelity.parts_bars(found).data
    assert len(bars.x) == fidelity.MOST_PARTS and bars.y[-1] == "layer 0" and bars.x[-1] == 1
    wanted = sensitivity.Measurement("<m>", resolve("nf4"), resolve("bf16"), "layer")
    html = sensitivity.parts_table(wanted, found)
    assert html.count("<tr>") == 41 and "top 30 of 40" in html and "<m>" not in html
    assert not fidelity.parts_bars(()).data


def test_stopped_before_its_turn_it_touches_nothing():
    from comparator.core.errors import Stopped

    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        zerogpu_runner.sensitivity(
            "nobody-at-all/none", resolve("nf4"), resolve("bf16"), "kind", 16, get_engine(), stop
        )
    assert not get_engine().queue.busy


def test_figures_are_kept_for_a_comparison_that_they_apply_to(tmp_path):
    page, comparison = page_of(tmp_path), sample.comparison()
    parts = (Part("mlp.up_proj", ("a", "b"), 0.5, None, 2.0, 0.5, 16),)
    recipe.measured.put((comparison.model, resolve("nf4"), resolve("bf16"), "kind"), parts)
    *_, row, _, table = sensitivity.offer(page, Shown(comparison), "nf4", "kind", "s")
    assert row.visible and "mlp.up_proj" in table
    other = sample.comparison(model="another")
    for seen, by in ((Shown(comparison), "layer"), (Shown(other), "kind"), (Shown(), "kind")):
        *_, row, _, table = sensitivity.offer(page, seen, "nf4", by, "s")
        assert not row.visible and table == ""
    stop = page.sensitivity_runs.begin("s")
    import gradio as gr

    untouched = sensitivity.offer(page, Shown(), "nf4", "kind", "s")
    assert all(value == gr.skip() for value in untouched), "the progress of the measurement is hidden"
    page.sensitivity_runs.end("s", stop)


@pytest.fixture
def measuring(visit, saved, two_layers):
    """A saved comparison, opened, while the sensitivity of its nf4 is being measured."""
    id = saved.save(sample.comparison(model=str(two_layers), cells=(sample.REFERENCE, sample.NF4)))
    opened = visit(path=f"?c={id}")
    page = opened.page
    opened.tab("Fidelity")
    page.wait_for_selector("#parts-run", timeout=60_000)
    assert page.locator("#parts-column input").input_value() == "nf4"
    page.click("#parts-run")
    page.wait_for_function(
        "() => /alone/.test(document.querySelector('#parts-said').innerText)", timeout=120_000
    )
    return opened


@pytest.mark.browser
@pytest.mark.slow
def test_on_the_page(measuring):
    """On a recording, whose model is here: nothing has to be run before."""
    opened, page = measuring, measuring.page
    page.click("#parts-stop")
    page.wait_for_function(
        "() => /Stopped/.test(document.querySelector('#parts-said').innerText)", timeout=120_000
    )
    page.click("#parts-run")
    page.wait_for_function(
        "() => /matters most/.test(document.querySelector('#parts-said').innerText)", timeout=400_000
    )
    page.wait_for_selector("#parts .js-plotly-plot")
    assert page.locator("#parts-table tbody tr").count() == 7
    assert "nf4 vs bf16" in opened.text("#parts-table")
    assert not page.locator("#parts-stop").is_enabled() and not opened.complaints


@pytest.mark.browser
@pytest.mark.slow
def test_a_run_during_a_measurement_is_queued_and_both_finish(measuring):
    """The run says what it is queued for, the measurement ends with its figures, then the variants answer."""
    opened, page = measuring, measuring.page
    opened.run(tokens=4, variants=("bf16", "nf4"))
    page.wait_for_function("() => /Queued/.test(document.querySelector('#notice').innerText)", timeout=60_000)
    assert "the sensitivity of nf4 is being measured" in opened.text("#notice")
    assert page.locator("#parts-stop").is_enabled(), "the measurement cannot be stopped"
    page.wait_for_function("() => /^Done/.test(document.querySelector('#notice').innerText)", timeout=400_000)
    page.wait_for_selector("#parts-table tbody tr", timeout=60_000)
    assert page.locator("#parts-table tbody tr").count() == 7, "what was measured is lost"
    assert "matters most" in opened.text("#parts-said") and "nf4 vs bf16" in opened.text("#parts-table")
    assert not page.locator("#parts-stop").is_enabled() and not opened.complaints
