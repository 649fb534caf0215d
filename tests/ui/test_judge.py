"""A judge on the Votes tab: what it decided is shown with its reasons, and kept; who may not ask for one is told why."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import sample
import tiny_models
from openai_server import OpenAIServer, script

from comparator.core.result import CellResult
from comparator.core.settings import Settings
from comparator.core.votes import Judge, Judgement, Votes
from comparator.engines import get_engine
from comparator.ui.admission import Admission
from comparator.ui.page import Page
from comparator.ui.tabs import judge

ASKER = SimpleNamespace(headers={}, client=SimpleNamespace(host="127.0.0.1"), session_hash="s")


def two(**changes):
    cells = (CellResult("bf16", text="It is <b>blue</b>."), CellResult("nf4", text="Blue."))
    return sample.comparison(cells=cells, **changes)


@pytest.fixture
def page(tmp_path) -> Page:
    settings = Settings(data_dir=tmp_path / "data", public=False)
    return Page(settings, Admission(settings))


def pressed(page: Page, shown, label, name="") -> list[list]:
    async def all_of() -> list[list]:
        return [values async for values in judge.stream(page, shown, label, name, ASKER)]

    with ThreadPoolExecutor(1) as thread:  # the browser tests' Playwright keeps a loop in this one
        return thread.submit(asyncio.run, asyncio.wait_for(all_of(), 300)).result()


def shown_of(page: Page, comparison):
    return page.admission.shown(
        page.admission.store.load(page.admission.store.save(comparison)), recorded=True
    )


def test_verdicts_and_reasons_are_shown_and_kept(page, tmp_path, settings_env):
    tiny_models.save(tmp_path / "model", chat=True)
    tokenizer = tiny_models.tokenizer(chat=True)
    says = tokenizer("It is <i>shorter</i>.\nVerdict: B", add_special_tokens=False)["input_ids"]
    shown = shown_of(page, two())
    with OpenAIServer(tokenizer, script(says, tiny_models.VOCABULARY, tokenizer.eos_token_id)) as server:
        settings_env(endpoints=f"judge={server.url}")
        views = pressed(page, shown, "endpoint@judge", str(tmp_path / "model"))
        get_engine().unload()
    assert "Starting" in views[0][0] and "Done." in views[-1][0], views[-1][0]
    results = views[-1][-1]
    assert "disagreed on 1 of 1 pair" in results and "nf4: It is &lt;i&gt;shorter&lt;/i&gt;." in results
    assert "Verdict: tie" in results and "<i>" not in results
    (kept,) = shown.comparison.votes.judges
    assert kept.judgements[0].choice == "tie" and judge.results_of(shown.comparison) == results
    assert not page.judge_runs.going("s")


def test_servers_come_first_and_columns_that_failed_do_not(page):
    settings = page.settings.model_copy(update={"endpoints": "vllm=http://127.0.0.1:9/v1"})
    names = judge.choices(sample.comparison(), settings)
    assert (
        names[0] == "endpoint@vllm" and sample.FAILED.label not in names and sample.REFERENCE.label in names
    )


@pytest.mark.parametrize("label", [None, "", "no-such-method", ["bf16"]])
def test_what_is_no_judge_is_refused_in_words(page, label):
    (view,) = pressed(page, shown_of(page, two()), label)
    assert 'class="notice bad"' in view[0]


def test_a_saved_comparisons_model_is_not_downloaded_by_the_way(page):
    (view,) = pressed(page, shown_of(page, two(model="somebody/large-model")), "bf16")
    assert "not on this machine" in view[0]


def test_a_public_server_runs_none_and_shows_what_others_said(tmp_path):
    settings = Settings(data_dir=tmp_path / "data", public=True)
    page = Page(settings, Admission(settings))
    verdict = Judge("m", "bf16", "…", (Judgement(0, 0, 1, "left", "left", ("Why.", "Why not.")),))
    shown = shown_of(page, two(votes=Votes(judges=(verdict,))))
    (view,) = pressed(page, shown, "bf16")
    assert "Judges do not run on a public server" in view[0] and not page.judge_runs.going("s")
    _, _, _, results = judge.offer(page, shown)
    assert "Judge bf16 of m: 1 pair" in results and "No human vote" in results and "Why not." in results
