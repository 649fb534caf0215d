"""Plots on the page: labels that can be read, pictures and tables that are saved, nothing drawn that nobody sees."""

from __future__ import annotations

import csv

import pytest
import sample
from page_checks import overlapping, sideways

from comparator.core.result import PromptInfo

pytestmark = pytest.mark.browser

HIDDEN = "() => [...document.querySelectorAll('#tabs .js-plotly-plot')].filter((e) => !e.offsetParent).length"


@pytest.fixture(scope="module")
def eight(browser, server):
    """The page with a saved comparison of eight columns, and another one in the history."""
    from comparator.core.settings import get_settings
    from comparator.store import open_store
    from tests.ui.conftest import opened

    get_settings.cache_clear()
    with open_store() as store:
        id = store.save(sample.many())
        store.save(sample.comparison(prompt=PromptInfo("Why do herons stand on one leg?")))
    visitor = opened(browser, f"{server.url}?c={id}")
    visitor.page.wait_for_selector("#recording .recording-head")
    yield visitor
    visitor.leave()


@pytest.mark.parametrize("width", [1440, 390, 320])
def test_no_label_of_eight_columns_covers_another(eight, width):
    page = eight.page
    page.set_viewport_size({"width": width, "height": 900})
    eight.tab("Fidelity")
    plot = page.locator('.picture:has(h3:text-is("Memory and KL divergence")) .js-plotly-plot')
    plot.locator(".annotation-text").first.wait_for()
    page.wait_for_function(  # it fits itself to the width
        "() => { const plot = [...document.querySelectorAll('.js-plotly-plot')].find((e) => e.querySelector('.annotation-text'));"
        " return Math.abs(plot._fullLayout.width - plot.clientWidth) <= 1; }"
    )
    assert plot.locator(".annotation-text").count() == 8
    assert not overlapping(page, ".js-plotly-plot .annotation-text")
    assert not overlapping(page, ".which-chart .name"), "the chart beside the sentence"
    assert not sideways(page)


def test_a_plot_is_saved_as_picture_and_as_table(eight, tmp_path):
    eight.page.set_viewport_size({"width": 1440, "height": 900})
    eight.tab("Fidelity")
    card = eight.page.locator('.picture:has(h3:text-is("Memory and KL divergence"))')
    card.locator(".js-plotly-plot").wait_for()
    for kind in ("png", "csv"):
        with eight.page.expect_download() as download:
            card.locator(f"[data-save-plot={kind}]").click()
        assert download.value.suggested_filename == f"memory-and-kl-divergence.{kind}"
        download.value.save_as(tmp_path / kind)
    assert (tmp_path / "png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.reader((tmp_path / "csv").read_text(encoding="utf-8").splitlines()))
    assert rows[0][:2] == ["series", "weights + quant state, MB"]
    assert ["int8", "163.4", "0.028"] in [row[:3] for row in rows]
    assert not any(row[0] == "Pareto front" for row in rows), "a line that guides the eye is no data"


def test_nothing_is_drawn_while_its_tab_is_hidden(eight):
    page = eight.page
    eight.tab("Fidelity")
    page.wait_for_selector(".js-plotly-plot .annotation-text")
    eight.tab("History")
    page.fill("#history-search input, #history-search textarea", "herons")
    page.wait_for_function("() => document.querySelectorAll('ul.history > li').length === 1")
    page.click("ul.history a.open")
    page.wait_for_function("() => /herons/.test(document.querySelector('#recording').innerText)")
    # The plots of the eight are gone, and those of the other one wait until somebody looks.
    page.wait_for_function(f"() => !({HIDDEN})()")
    eight.tab("Fidelity")
    page.wait_for_function("() => document.querySelectorAll('.js-plotly-plot .annotation-text').length === 2")
    assert not eight.complaints, eight.complaints
