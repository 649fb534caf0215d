"""The page's export: the real engine behind its handler, what it refuses, and that a public page has none."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import sample

from comparator.core.settings import Settings
from comparator.engines import get_engine

pytest.importorskip("gradio")

from comparator.ui.admission import Admission
from comparator.ui.build import build_ui
from comparator.ui.form import Shown
from comparator.ui.page import Page
from comparator.ui.results import export

ASKER = SimpleNamespace(session_hash="somebody", headers={}, client=None)


def page_of(tmp_path, **settings) -> Page:
    chosen = Settings(data_dir=tmp_path, **settings)
    return Page(chosen, Admission(chosen))


def lines(page: Page, shown: Shown, label: str, folder: str, repo: str = "") -> list[str]:
    """Every status line that Export sends to the page."""

    async def pressed() -> list[str]:
        return [
            v[0]
            async for v in export.stream(page, shown, label, folder, repo, ASKER)
            if isinstance(v[0], str)
        ]

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, pressed()).result()


@pytest.fixture
def shown(two_layers) -> Shown:
    return Shown(sample.comparison(model=str(two_layers)))


def test_a_column_is_written_with_its_card_and_loads(tmp_path, shown) -> None:
    from transformers import AutoModelForCausalLM

    page = page_of(tmp_path)
    said = lines(page, shown, "bf16", "mine")
    folder = tmp_path / "exports" / "mine"
    assert "Written to" in said[-1] and str(folder) in said[-1], said[-1]
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2
    assert (
        "What was measured" in (folder / "README.md").read_text()
        and "tok/s" in (folder / "README.md").read_text()
    )
    assert "already exists" in lines(page, shown, "bf16", "mine")[-1]
    get_engine().unload()


@pytest.mark.parametrize(
    ("label", "folder", "repo", "words"),
    [
        ("bf16", "../x", "", "not the name of a folder"),
        ("bf16", "/etc/x", "", "not the name of a folder"),
        ("bf16", "", "", "not the name of a folder"),
        ("gptq@x", "mine", "", "No variant"),
        ("bf16", "mine", "a b", "not the name of a Hub repo"),
        ("bf16", "mine", "me/mine", "needs a token"),
    ],
)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(
    tmp_path, shown, label, folder, repo, words
) -> None:
    assert words in lines(page_of(tmp_path), shown, label, folder, repo)[-1]
    assert not (tmp_path / "exports").exists()


def test_a_public_server_exports_nothing(tmp_path, shown) -> None:
    assert "public server" in lines(page_of(tmp_path, public=True), shown, "bf16", "mine")[-1]
    ids = {b.elem_id for b in build_ui(Settings(data_dir=tmp_path, public=True)).blocks.values()}
    assert "export" not in ids and "set-only" in ids


def test_the_columns_are_offered_by_name() -> None:
    comparison = sample.comparison()
    _, choice, name, _ = export.offer(Shown(comparison))
    assert [c[0] for c in choice.choices] == [c.label for c in comparison.cells if c.status == "ok"]
    assert name == export.folder_name(choice.value)
    assert export.folder_name("nf4:dq,compute=fp16 + pirate*0.5") == "nf4-dq-compute-fp16-pirate-0.5"
