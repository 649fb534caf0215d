"""Links, files and what they open, as somebody with a browser meets them."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import sample

from comparator.core import document
from comparator.reporting import export

pytestmark = pytest.mark.browser

ANSWERS = "() => [...document.querySelectorAll('.card')].map((c) => [c.getAttribute('aria-label'), c.querySelector('.answer').innerText])"
SHARED = "() => document.querySelector('#share-link')?.dataset.copyLink"
SIZED = "() => / MB/.test(document.querySelector('.pick[data-notation=\"nf4\"] .size')?.innerText)"

# Markup, template languages and addresses: what would run if any string were taken for more than text.
HOSTILE = (
    '<img src=x onerror="window.pwned=1"><script>window.pwned=2</script>${window.pwned=3}'
    "{{constructor.constructor('window.pwned=4')()}}{{{this}}}`${alert(1)}` "
    "[a](javascript:window.pwned=6)\"'><svg onload=window.pwned=5><iframe srcdoc=x>"
)


def hostile_document() -> dict:
    """The sample with markup in every string that is free to say anything."""
    kept = ("id", "created_at", "status", "finish_reason")

    def spoil(value, key=""):
        if isinstance(value, dict):
            return {name: spoil(inner, name) for name, inner in value.items()}
        if isinstance(value, list):
            return [spoil(inner, key) for inner in value]
        return HOSTILE if isinstance(value, str) and key not in kept else value

    return spoil(json.loads(document.dumps(sample.comparison())))


def recording(visitor, timeout_s: float = 60) -> str:
    visitor.page.wait_for_selector("#recording section", timeout=timeout_s * 1000)
    return visitor.text("#recording")


def test_a_shared_link_shows_the_same_in_another_browser(visit):
    first = visit()
    first.run(tokens=6, prompt="What is the capital of France?", variants=("bf16", "nf4"))
    first.finished()
    first.page.wait_for_selector("#share-link")
    first.page.click("#share-link")
    first.page.wait_for_function("() => /copied/i.test(document.querySelector('#share-link').innerText)")
    link = first.page.evaluate("() => navigator.clipboard.readText()")
    assert link == first.page.evaluate(SHARED) and "/?c=" in link
    assert first.page.url == link, "reloading the page would lose what it shows"

    second = visit(path=link.partition("/?")[2] and "?" + link.partition("?")[2])
    on_progress = recording(second)
    assert second.page.evaluate(ANSWERS) == first.page.evaluate(ANSWERS)
    assert second.text("#summary") == first.text("#summary")
    assert (
        "Saved comparison" in on_progress
        and "UTC" in on_progress
        and "What is the capital of France?" in on_progress
    )
    second.page.click("#recording summary")
    assert "torch" in second.text("#recording") and "greedy" in second.text("#recording")
    second.tab("Latency")
    second.page.wait_for_selector("#tabs .picture svg.main-svg", timeout=60_000)
    for tab in ("Memory", "Layers", "Fidelity"):
        second.tab(tab)
        second.page.wait_for_function(
            "() => !/this tab (then )?shows/.test(document.querySelector('#tabs').innerText)"
        )
    second.tab("Layers")
    second.page.wait_for_function(
        "() => /model.layers.0/.test(document.querySelector('#layers-table').textContent)"
    )
    assert second.page.locator("[data-release]").count() == 0, "a recording holds nothing in memory"

    second.page.click("[data-again]")
    second.page.wait_for_function("() => /filled in/.test(document.querySelector('#notice').innerText)")
    assert second.page.input_value("#prompt textarea") == "What is the capital of France?"
    assert second.page.input_value("#set-max-new-tokens input") == "6"
    assert second.page.locator(".pick.on code").all_inner_texts() == ["bf16", "nf4"]
    assert not second.complaints


@pytest.mark.slow  # two servers; that a document survives is shown by tests/store/test_store_at_once.py
def test_a_link_survives_a_kill_and_needs_no_model(serve, open_at, tmp_path):
    from comparator.core.settings import Settings
    from comparator.store import open_store

    nothing = {
        "COMPARATOR_CACHE_DIR": str(tmp_path / "empty"),
        "COMPARATOR_MODEL": "nobody/nothing",
        "HF_HUB_OFFLINE": "1",
    }
    with open_store(Settings(data_dir=tmp_path / "data")) as store:
        id = store.save(sample.comparison())
    seen = []
    for _ in range(2):
        server = serve(**nothing)
        visitor = open_at(f"{server.url}?c={id}")
        assert "31 Jan 2026, 12:00 UTC" in recording(visitor) and "CPU (2 cores)" in recording(visitor)
        seen.append(visitor.page.evaluate(ANSWERS))
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait(15)
    assert seen[0] == seen[1] and seen[0][1] == ["nf4", "The city of Paris is the capital of France."]


def test_a_recipe_fills_the_form_and_runs_nothing(visit):
    visitor = visit(
        path="?model=smollm2-135m&v=nf4:dq&v=fp4:dq,compute=fp16&v=bf16&a=none&a=pirate&p=H%C3%A4llo+%26+you%3F&s=Be+brief"
        "&n=7&t=0.5&seed=3&ref=nf4:dq&chat=0&f=none"
    )
    visitor.page.wait_for_function(
        "() => /filled in from the link/.test(document.querySelector('#notice').innerText)"
    )
    assert visitor.page.input_value("#prompt textarea") == "Hällo & you?"
    assert visitor.page.input_value("#set-max-new-tokens input") == "7"
    assert visitor.page.input_value("#set-temperature input") == "0.5"
    assert visitor.page.locator(".pick.on code").all_inner_texts() == [
        "bf16",
        "nf4:dq",
        "fp4:dq,compute=fp16",
    ]
    assert visitor.page.locator('.pick[data-notation="nf4:dq"] input[type=radio]').is_checked()
    visitor.page.wait_for_function(
        "() => [...document.querySelectorAll('#columns input')].filter((box) => box.checked).length === 6"
    )
    assert visitor.page.locator(".card").count() == 0 and visitor.page.locator("#run").is_enabled()


def test_a_recipe_of_single_columns_switches_the_others_off(visit):
    visitor = visit(path="?v=bf16&v=nf4+%2B+pirate")
    # Sizes are the last thing that a page looks up by itself: what would undo the link's selection has come by then.
    visitor.page.wait_for_function(SIZED)
    visitor.page.wait_for_function(
        "() => [...document.querySelectorAll('#columns input')].filter((box) => box.checked).length === 2"
    )
    boxes = visitor.page.evaluate(
        "() => [...document.querySelectorAll('#columns label')].map((l) => [l.innerText.trim(), l.querySelector('input').checked])"
    )
    assert [name for name, on in boxes if on] == ["bf16", "nf4 + pirate"]
    assert len(boxes) == 4


def test_a_link_that_opens_nothing_shows_a_way_on(visit, server):
    visitor = visit(path="?c=AAAAAAAAAAAAAAAAAAAAAA")
    for query, said in (
        ("?c=AAAAAAAAAAAAAAAAAAAAAA", "There is no comparison with this id here"),
        ("?c=../../../etc/passwd", "is not the id of a comparison"),
        ("?v=nf5", "nf5"),
        ("?n=-3", "is outside"),
        ("?c=%3Cscript%3Ewindow.pwned%3D1%3C/script%3E", "<script>window.pwned=1</script>"),
    ):
        if visitor.page.url != server.url + query:
            visitor.page.goto(server.url + query)
        visitor.page.wait_for_selector(".recording.missing", timeout=60_000)
        assert said in visitor.text(".recording.missing")
        assert visitor.page.evaluate("() => window.pwned") is None
        assert visitor.page.locator("[data-history]").is_visible(), f"{query} shows no way on"
    visitor.page.click("[data-history]")
    visitor.page.wait_for_function(
        "() => document.querySelector('#tabs button[aria-selected=true]').innerText === 'History'"
    )
    visitor.page.click("[data-fresh]")
    visitor.page.wait_for_selector(".intro", timeout=60_000)
    assert "c=" not in visitor.page.url and visitor.page.locator("#run").is_enabled()


def test_a_deleted_comparison_says_so(visit, saved):
    id = saved.save(sample.comparison())
    saved.delete(id)
    visitor = visit(path=f"?c={id}")
    visitor.page.wait_for_selector(".recording.missing", timeout=60_000)
    assert "deleted" in visitor.text(".recording.missing")


def test_every_kind_of_file(visit, saved):
    """Of a prompt set, which has all of them."""
    id = saved.save(sample.with_set(count=3))
    visitor = visit(path=f"?c={id}")
    recording(visitor)
    whole = saved.load(id)
    for ending in export.FORMATS:
        visitor.page.click("#share summary")
        with visitor.page.expect_download(timeout=60_000) as waited:
            visitor.page.click(f'[data-save="{ending}"]')
        file = waited.value
        assert file.suggested_filename.endswith(ending) and "2026-01-31" in file.suggested_filename
        text = Path(file.path()).read_bytes().decode()
        assert text == export.render(whole, f"x{ending}"), f"{ending} is not the report"
    assert not visitor.complaints


def test_an_uploaded_document_is_opened_and_its_strings_are_data(visit, saved, tmp_path):
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(hostile_document()))
    visitor = visit()
    visitor.tab("History")
    visitor.page.set_input_files(".history-bar input[type=file]", file)
    on_progress = recording(visitor)
    assert "Opened from a file" in on_progress and "<script>window.pwned=2</script>" in on_progress
    assert HOSTILE in visitor.page.evaluate(ANSWERS)[0][1].replace("\n", " ")
    for tab in ("Latency", "Memory", "Layers", "Fidelity", "Adapters", "History"):
        visitor.tab(tab)
        visitor.page.wait_for_selector(f'button[role="tab"][aria-selected="true"]:has-text("{tab}")')
    time.sleep(1)  # what a tab shows stays in the page; the last one may still be at it
    made = visitor.page.evaluate(
        "() => [...document.querySelectorAll('img[src=x], svg[onload], iframe, #main script, a[href^=javascript]')]"
        ".map((e) => e.parentElement.outerHTML.slice(0, 200))"
    )
    assert not made, f"markup from a document became elements: {made}"
    visitor.page.click("[data-again]")
    visitor.page.wait_for_function(
        "() => /is not a method/.test(document.querySelector('#notice').innerText)"
    )
    assert visitor.page.evaluate("() => window.pwned") is None, "a string of a document was executed"
    assert not visitor.foreign and not visitor.complaints
    # Kept under an id of its own: the link opens it for others, as what it is.
    other = visit(path="?" + visitor.page.url.partition("?")[2])
    assert "Opened from a file" in recording(other)
    other.page.click("#share summary")
    with other.page.expect_download(timeout=60_000) as waited:
        other.page.click('[data-save=".html"]')
    page = other.context.new_page()
    page.goto(f"file://{waited.value.path()}")
    assert page.evaluate("() => window.pwned") is None and page.locator("img[src=x]").count() == 0


def test_a_file_that_is_no_document_is_refused_and_what_is_shown_stays(visit, saved, tmp_path):
    id = saved.save(sample.comparison())
    visitor = visit(path=f"?c={id}")
    recording(visitor)
    before = visitor.page.evaluate(ANSWERS)
    visitor.tab("History")
    for number, (content, said) in enumerate([
        (b'{"schema": 99}', "schema"), (b"not json", "json"), (b"[" * 5000, "nests"),
        (b'{"schema":1,"id":"x","created_at":NaN}', "nan"),
    ]):  # fmt: skip
        file = tmp_path / f"theirs-{number}.json"
        file.write_bytes(content)
        visitor.page.set_input_files(".history-bar input[type=file]", file)
        visitor.page.wait_for_function(
            "(said) => document.querySelector('#notice .notice.bad')?.innerText.toLowerCase().includes(said)",
            arg=said,
            timeout=30_000,
        )
        assert visitor.page.evaluate(ANSWERS) == before


def test_a_recording_with_more_columns_than_places_shows_them_all(visit, saved):
    cells = tuple(replace(sample.NF4, variant=f"nf4:skip=layer{n}") for n in range(11))
    id = saved.save(sample.comparison(cells=(sample.REFERENCE, *cells)))
    visitor = visit(path=f"?c={id}")
    recording(visitor)
    assert visitor.page.locator(".card").count() == 12
