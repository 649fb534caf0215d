"""A prompt set as somebody with a browser meets it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

TASKS = Path(__file__).resolve().parents[1] / "comparison" / "tasks" / "tasks"

pytestmark = [pytest.mark.browser, pytest.mark.slow]

SET = '{"id": "sum", "prompt": "What is 2 + 2?", "check": "number", "expected": 4, "kind": "arithmetic"}\n{"id": "hi", "prompt": "Hello"}'


def test_a_set_is_written_run_opened_and_linked(visit):
    visitor = visit()
    page = visitor.page
    page.locator("#prompt-set input").click()
    page.get_by_role("option", name="your own set").click()
    page.locator("#prompt-set-text textarea").fill(SET)
    page.wait_for_function("() => /2 prompts/.test(document.querySelector('#prompt-set-about').innerText)")
    visitor.run(tokens=4, variants=("bf16", "nf4"))
    visitor.finished()
    page.wait_for_selector("#set-matrix .set-row")
    rows = page.locator("#set-matrix .set-row")
    assert rows.count() == 2 and "2 prompts" in visitor.text("#prompt-set-result h3")
    page.locator('#set-matrix [data-prompt="sum"] summary').click()
    assert "What is 2 + 2?" in visitor.text('#set-matrix [data-prompt="sum"] .set-detail')
    page.locator("#set-search input, #set-search textarea").first.fill("hello")
    page.wait_for_function("() => document.querySelectorAll('#set-matrix .set-row').length === 1")
    if folder := os.environ.get("SCREENSHOTS"):
        page.screenshot(path=f"{folder}/set.png", full_page=True)
    link = page.evaluate("() => document.querySelector('#share-link').dataset.copyLink")
    page.goto(link)
    page.wait_for_function("() => document.querySelectorAll('#set-matrix .set-row').length === 2")
    assert "2 prompts; the first" in visitor.text("#recording")
    page.click("[data-again]")
    page.wait_for_function(
        "() => document.querySelector('#prompt-set-text textarea')?.value.includes('What is 2 + 2?')"
    )
    assert not visitor.complaints, visitor.complaints


def test_a_task_is_chosen_run_and_shown(visit):
    visitor = visit()
    page = visitor.page
    page.locator("#prompt-set input").click()
    page.get_by_role("option", name="a task of lm-evaluation-harness").click()
    page.locator("#task-name input, #task-name textarea").first.fill(str(TASKS / "capitals.yaml"))
    page.locator("#task-limit input").fill("2")
    visitor.run(tokens=2, variants=("bf16", "nf4"))
    visitor.finished()
    page.wait_for_selector("#set-matrix .set-row")
    assert page.locator("#set-matrix .set-row").count() == 2
    assert "capitals acc" in visitor.text("#prompt-set-result") and "2 documents" in visitor.text(
        "#prompt-set-result h3"
    )
    assert not visitor.complaints, visitor.complaints
