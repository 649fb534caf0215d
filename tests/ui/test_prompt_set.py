"""A prompt set on the page: chosen, run, shown a page at a time; a large one opens at once."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import sample

from comparator.comparison.prompts import reader
from comparator.core.errors import UserError
from comparator.core.prompt_set import PromptSet
from comparator.core.settings import Settings
from comparator.deploy.limits import limits_of
from comparator.ui.admission import Admission
from comparator.ui.build import build_ui
from comparator.ui.form import ONE_PROMPT, OWN_SET, Form, Shown
from comparator.ui.page import Page
from comparator.ui.panel import prompt_set as panel
from comparator.ui.results import saved_comparison, set_table

GOOD = {"model": "smollm2-135m", "picked": {"on": ["bf16", "nf4"], "reference": "auto"}, "prompt": "Hi"}


def test_the_form_asks_for_a_set():
    assert Form(**GOOD).request(8).prompts is None
    shipped = Form(**GOOD, prompt_set="everyday").request(8)
    assert shipped.prompts == reader.load("everyday") and shipped.prompt == shipped.prompts.prompts[0].text
    own = Form(
        **GOOD, prompt_set=OWN_SET, set_text='{"prompt": "2 + 2?", "expected": 4, "check": "number"}'
    ).request(8)
    assert [p.prompt for p in own.prompts.prompts] == ["2 + 2?"]
    with pytest.raises(UserError, match="empty"):
        Form(**GOOD, prompt_set=OWN_SET).request(8)
    assert "is not JSON" in panel.describe(OWN_SET, "{oops")


def test_a_public_server_counts_every_prompt():
    limits = limits_of(Settings(public=True))
    request = Form(**GOOD, prompt_set=OWN_SET, set_text="Hello\n" * 70).request(8)
    with pytest.raises(UserError, match="tokens in one comparison"):
        limits.check(request)
    long = replace(
        request,
        prompts=PromptSet(
            "long", tuple(replace(p, prompt="word " * 6000) for p in request.prompts.prompts[:20])
        ),
    )
    with pytest.raises(UserError, match="prompts of the set"):
        limits.check(long)


def test_a_thousand_prompts_and_four_columns_open_at_once(own_dirs):
    comparison = sample.with_set(1000, "The city of Paris is the capital of France. " * 8)
    page = Page(Settings(), Admission(Settings()))
    page.cards = [None] * 8
    id = page.admission.store.save(comparison, None)
    start = time.process_time()
    opened = page.admission.store.load(id)
    values = [*saved_comparison.values(page, opened, None), *set_table.show(Shown(opened))]
    took_s, size = time.process_time() - start, sum(len(v) for v in values if isinstance(v, str))
    assert size < 2e6, f"{size / 1e6:.1f} MB go to the browser: it is not one page of the matrix"
    assert took_s < 3, f"{took_s:.1f} s of CPU time to open it"
    matrix = set_table.draw(Shown(opened), "all", "all", "matters", "", 0)[0]
    assert matrix.count("<details") == set_table.PAGE_SIZE
    entry = page.admission.store.entry(id)
    assert entry.prompt.startswith("Prompt set everyday (1000)")


def test_the_matrix_is_filtered_sorted_and_turned():
    shown = Shown(sample.with_set(60))
    ids = lambda *how: [row.prompt.id for row in set_table.select(shown.comparison, *how)]  # noqa: E731
    assert ids("all", "all", "written", "")[:3] == ["p0", "p1", "p2"]
    assert set(ids("flipped", "all", "matters", "")) == {
        f"p{n}" for n in range(60) if (n % 5 == 0) or (n % 3 == 0)
    }
    assert all(int(p[1:]) % 2 for p in ids("all", "kind:kind1", "matters", ""))
    assert (
        ids("all", "all", "kl:1", "")[0] == "p59" and ids("all", "all", "matters", "question 17")[0] == "p17"
    )
    assert len(ids("nonsense", "kind:", "kl:99", "")) == 0 and len(ids("nonsense", "no", "kl:99", "")) == 60
    last = set_table.draw(shown, "all", "all", "written", "", 10_000)
    assert last[1] == 50 and last[0].count("<details") == 10, "the last page is not what is left"


def test_a_page_is_built_and_one_prompt_shows_no_set(own_dirs):
    build_ui(Settings())
    assert set_table.show(Shown(sample.comparison()))[6] == ""
    assert panel.describe(ONE_PROMPT, "")
