"""The History tab: what was measured before is found, opened, named, deleted, brought back and laid side by side."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest
import sample
from playwright.sync_api import TimeoutError

from comparator.core.result import Environment, PromptInfo
from comparator.ui.results import side_by_side

ROWS = "() => [...document.querySelectorAll('ul.history > li')].map((li) => li.dataset.id)"


def about(prompt: str, **changes):
    return sample.comparison(prompt=PromptInfo(prompt, None, True, 9), **changes)


def listed(visitor, query: str, expected: int) -> list[str]:
    """Open the tab, search, and wait for so many entries."""
    visitor.tab("History")
    visitor.page.fill("#history-search input, #history-search textarea", query)
    visitor.page.wait_for_function(
        f"() => document.querySelectorAll('ul.history > li').length === {expected}", timeout=30_000
    )
    return visitor.page.evaluate(ROWS)


@pytest.mark.browser
def test_search_open_rename_delete_and_undo(visit, saved):
    zebra, lion = saved.save(about("Why has a zebra stripes?")), saved.save(about("How fast is a lion?"))
    visitor = visit()
    page = visitor.page
    assert listed(visitor, "ZEBRA nf4", 1) == [zebra]
    assert listed(visitor, "%' OR 1=1 --", 0) == []
    assert listed(visitor, "lion", 1) == [lion]

    page.click("ul.history a.open")
    page.wait_for_selector("#recording section")
    assert "How fast is a lion?" in visitor.text("#recording")
    page.wait_for_function(f"() => location.search === '?c={lion}'")

    page.click("[data-rename]")
    page.get_by_label("Name", exact=True).fill("The <b>cat</b> of cats")
    page.keyboard.press("Enter")
    page.wait_for_function("() => /Renamed/.test(document.querySelector('#history-said').innerText)")
    assert visitor.text("ul.history a.open") == "The <b>cat</b> of cats"
    assert saved.entry(lion).name == "The <b>cat</b> of cats"

    page.click("[data-delete]")
    page.wait_for_selector("[data-undo]")
    page.wait_for_function("() => !document.querySelector('ul.history')")
    assert saved.search("lion") == [], "deleted on the page, and still in the store"
    other = visit(path=f"?c={lion}")
    other.page.wait_for_selector(".recording.missing", timeout=60_000)

    page.click("[data-undo]")
    page.wait_for_function("() => document.querySelectorAll('ul.history > li').length === 1")
    other.page.reload()
    other.page.wait_for_selector("#recording .recording-head", timeout=60_000)
    assert not visitor.complaints


@pytest.mark.browser
def test_two_of_one_prompt_side_by_side(visit, saved):
    elsewhere = Environment(
        "NVIDIA H100 80GB", "570.1", "Another processor", 10**12, "3.12.1", {"torch": "2.11.0"}
    )
    faster = replace(
        sample.NF4, text="The capital is Paris.", latency=replace(sample.NF4.latency, decode_tok_s=110.0)
    )
    here = saved.save(about("Where do pelicans live?"))
    there = saved.save(
        about("Where do pelicans live?", environment=elsewhere, cells=(sample.REFERENCE, faster))
    )
    saved.save(about("Do pelicans sing?"))
    visitor = visit()
    page = visitor.page
    listed(visitor, "pelicans", 3)
    assert page.locator("#history-beside").is_disabled()
    page.check(f'li[data-id="{here}"] input.tick')
    assert page.locator("input.tick:disabled").count() == 1, "another prompt cannot be compared with this one"
    page.check(f'li[data-id="{there}"] input.tick')
    said = "(words) => document.querySelector('#history-beside').innerText.trim() === words"
    page.wait_for_function(said, arg="Side by side (2)")
    both = [f'li[data-id="{id}"] input.tick' for id in (here, there)]
    put = "([boxes, on]) => boxes.forEach((b) => { b = document.querySelector(b); if (b.checked !== on) b.click(); })"
    for on, words in ((False, "Side by side"), (True, "Side by side (2)")):  # faster than the app answers
        for _ in range(3):  # a list that comes late takes all ticks away
            page.evaluate(put, [both, on])
            with contextlib.suppress(TimeoutError):
                page.wait_for_function(said, arg=words, timeout=15_000)
                break
        assert page.inner_text("#history-beside").strip() == words
    page.click("#history-beside")
    page.wait_for_selector("#side-by-side table", timeout=30_000)
    on_progress = visitor.text("#side-by-side")
    for words in (
        "NVIDIA H100 80GB",
        "CPU (2 cores)",
        "torch 2.11.0",
        "torch 2.13.0+cpu",
        "×7.64",
        "The capital is Paris.",
    ):
        assert words in on_progress, f"{words} is missing from the comparison of comparisons"
    assert "Arr, matey!" in on_progress, "a column that only one of them has is shown too"


def test_side_by_side_says_what_was_asked_for_differently():
    one = sample.comparison()
    other = sample.comparison(settings=replace(one.settings, temperature=0.7), model="user/other")
    assert "the models and the settings differ" in side_by_side.render([one, other])
    assert "Not the same work" not in side_by_side.render([one, one])


def test_side_by_side_writes_strings_as_text():
    nasty = "<img src=x onerror=alert(1)>"
    cell = replace(sample.NF4, variant=nasty, text=nasty)
    both = [
        sample.comparison(prompt=PromptInfo(nasty), cells=(cell,), environment=Environment(nasty, cpu=nasty))
    ] * 2
    assert "<img" not in side_by_side.render(both)
