"""Adapters on the page: the form's columns, what is told of an adapter, and a matrix in a real browser."""

from __future__ import annotations

import pytest

from comparator.core.errors import UserError
from comparator.core.request import BUILTIN_MODEL
from comparator.core.settings import Settings
from comparator.core.variant import Adapter
from comparator.ui.admission import Admission
from comparator.ui.form import Form
from comparator.ui.panel import adapters

PICKED = {"on": ["bf16", "nf4"], "reference": "auto"}
GOOD = {"model": "smollm2-135m", "picked": PICKED, "prompt": "Hi"}


def labels(**fields) -> list[str]:
    return [c.label for c in Form(**GOOD | fields).request(8).cells]


def test_columns_are_variants_times_adapters_grouped_by_variant():
    assert labels(adapters=["pirate", "none"]) == ["bf16", "bf16 + pirate", "nf4", "nf4 + pirate"]
    assert labels(adapters=["pirate*0.5"]) == ["bf16 + pirate*0.5", "nf4 + pirate*0.5"]


@pytest.mark.parametrize("nothing", [None, [], (), "none", 7, ["none"]])
def test_nothing_ticked_means_no_adapter(nothing):
    assert labels(adapters=nothing) == ["bf16", "nf4"]


def test_single_columns_can_be_switched_off():
    known = labels(adapters=["none", "pirate"])
    on = ["bf16", "nf4 + pirate"]
    assert labels(adapters=["none", "pirate"], columns=on, known_columns=known) == on
    # A column that the list did not know yet is on: the list follows a moment after a tick.
    assert "nf4 + pirate*0.5" in labels(
        adapters=["none", "pirate", "pirate*0.5"], columns=on, known_columns=known
    )
    with pytest.raises(UserError, match="columns are deselected"):
        labels(adapters=["none", "pirate"], columns=[], known_columns=known)


def test_the_reference_is_the_variant_without_an_adapter():
    picked = PICKED | {"reference": "nf4"}
    request = Form(**GOOD | {"picked": picked, "adapters": ["none", "pirate"]}).request(8)
    assert request.reference.label == "nf4"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["a/b", "c/d", "e/f", "g/h", "i/j"], "More than 4"),
        (["pirate:loud"], "not an adapter option"),
        (["*2"], "empty"),
    ],
)
def test_wrong_adapters_are_refused_before_anything_runs(wrong, said):
    with pytest.raises(UserError, match=said):
        Form(**GOOD | {"adapters": wrong}).request(8)


def test_too_many_columns_are_counted_with_the_adapters():
    with pytest.raises(UserError, match="4 columns"):
        Form(**GOOD | {"adapters": ["none", "pirate"]}).request(3)


def test_the_grid_remembers_what_was_switched_off():
    known = ["bf16", "bf16 + pirate", "nf4", "nf4 + pirate"]
    update, labelled = adapters.grid(PICKED, ["none", "pirate", "pirate*2"], known[-1:])
    assert "nf4 + pirate" in labelled and "nf4 + pirate*2" in labelled
    assert "nf4 + pirate" not in update.value and "nf4 + pirate*2" in update.value and update.visible
    assert not adapters.grid(PICKED, ["none"], [])[0].visible, (
        "without adapters there is nothing to switch off"
    )


def test_what_an_adapter_is_and_why_it_is_not_one_are_told_as_text():
    on_progress = adapters.described("pirate", "", Admission(Settings()))
    for words in ("LoRA, rank 4", "alpha 8", "scaling 2", "q_proj", "1.47 MB", "SmolLM2-135M-Instruct"):
        assert words in on_progress
    refused = adapters.described("./<img src=x>", "", Admission(Settings()))
    assert "<img" not in refused and "no folder" in refused
    assert "public" in adapters.described("./x", "", Admission(Settings(public=True)))


def test_strange_notations_make_no_markup():
    assert "<b>x" not in adapters.described(Adapter("./<b>x</b>").notation, "", Admission(Settings()))


@pytest.mark.browser
@pytest.mark.slow
def test_a_matrix_on_the_page(visit):
    visitor = visit()
    page = visitor.page
    visitor.use(BUILTIN_MODEL)
    visitor.tick("bf16", "nf4")
    page.locator("#adapters").get_by_label("pirate").check()
    page.wait_for_function(
        "() => /rank 4/.test(document.querySelector('#adapter-facts').innerText)", timeout=60_000
    )
    page.wait_for_function("() => document.querySelectorAll('#columns input').length === 4")
    page.locator("#columns").get_by_label("nf4", exact=True).uncheck()
    page.wait_for_timeout(500)
    visitor.run(tokens=6, prompt="What is the capital of France?")
    visitor.finished()
    assert visitor.states() == {"bf16": "done", "bf16 + pirate": "done", "nf4 + pirate": "done"}
    for name, start in (
        ("bf16", "The capital"),
        ("bf16 + pirate", "Arr, matey"),
        ("nf4 + pirate", "Arr, matey"),
    ):
        text = page.locator(f'.card[aria-label="{name}"] .answer .text').inner_text()
        assert text.startswith(start), f"{name} says {text!r}"

    visitor.tab("Adapters")
    page.wait_for_selector('[data-table="matrix"] tbody tr', timeout=30_000)
    rows = page.locator('[data-table="matrix"] tbody tr')
    written = [row.locator("th, td").all_inner_texts() for row in rows.all()]
    assert [row[0] for row in written] == ["bf16", "nf4"]
    assert written[1][1] == "", "a column that was switched off has no figure"
    assert all(float(row[2]) > 0 for row in written)
    assert not visitor.complaints, visitor.complaints


@pytest.mark.browser
def test_an_adapter_that_does_not_exist_is_refused_where_it_is_typed(visit):
    visitor = visit()
    page = visitor.page
    # As the first test of its app: until the model's facts are there, a click may meet a page that is still being drawn.
    page.wait_for_function(
        "() => /parameters/.test(document.querySelector('#facts').innerText)", timeout=60_000
    )
    page.locator("#add-adapter > button").click()
    page.locator("#adapter-source textarea, #adapter-source input").fill("./nothing-here")
    page.click("#adapter-add")
    page.wait_for_selector("#adapter-verdict >> text=no folder", timeout=60_000)
    page.locator("#adapter-source textarea, #adapter-source input").fill("pirate*0.5")
    page.click("#adapter-add")
    page.wait_for_selector("#adapters >> text=pirate*0.5", timeout=60_000)
    assert page.locator("#adapters").get_by_label("pirate*0.5").is_checked()
