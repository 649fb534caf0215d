"""The Votes tab: nothing on the page names the answers before the vote; keys; win rates; what a browser may not do."""

from __future__ import annotations

from types import SimpleNamespace

import page_checks
import pytest
import sample

from comparator.core.prompt_set import SetAnswer, SetPrompt, SetResult
from comparator.core.result import CellResult, PromptInfo
from comparator.core.settings import Settings
from comparator.store import open_store
from comparator.ui.admission import VOTES_PER_MINUTE, Admission
from comparator.ui.page import Page
from comparator.ui.tabs import votes
from comparator.ui.tabs.votes import Poll, acted, offered

NAMES = ("bf16", "int8", "nf4")
KEY, OTHER = "k" * 22, "o" * 22


def one(*texts: str):
    cells = tuple(CellResult(name, text=text) for name, text in zip(NAMES, texts, strict=False))
    return sample.comparison(cells=cells, prompt=PromptInfo("Why is the sky blue?"))


def several(count: int):
    prompts = tuple(SetPrompt(f"p{n}", f"Question {n}?") for n in range(count))
    answers = tuple(
        tuple(SetAnswer(f"Answer {n} {'abc'[at]}", 3, "eos") for n in range(count)) for at in range(3)
    )
    return sample.comparison(
        schema=2,
        cells=tuple(CellResult(n, text="x") for n in NAMES),
        prompt_set=SetResult("own", prompts, answers),
    )


class Voter:
    """Somebody at the tab, without a browser: what they press, and what the page shows them."""

    def __init__(self, page: Page, id: str, key: str = KEY):
        self.page, self.key = page, key
        self.shown = page.admission.shown(page.admission.store.load(id), recorded=True)
        self.html, self.rates, self.poll = offered(page, self.shown, key)

    def press(self, **event) -> str:
        asker = SimpleNamespace(headers={}, client=SimpleNamespace(host="198.51.100.7"))
        self.html, self.rates, self.poll = acted(self.page, self.shown, self.poll, self.key, event, asker)
        return self.html

    @property
    def cast(self):
        now = self.shown.comparison.votes
        return now.votes if now else ()


@pytest.fixture
def page(tmp_path) -> Page:
    settings = Settings(data_dir=tmp_path / "data", public=False)
    return Page(settings, Admission(settings))


def test_no_name_before_the_vote_and_both_after_it(page):
    voter = Voter(page, page.admission.store.save(several(4)))
    assert "Start voting" in voter.html
    blind = voter.press(act="start") + voter.rates
    assert not any(name in blind for name in NAMES) and "Question" in blind
    ballot = voter.poll.ballot
    shown = voter.press(choice="right")
    left, right = (NAMES[n] for n in (ballot.left, ballot.right))
    assert shown.index(left) < shown.index(f'Right <code class="notation">{right}')
    assert f"You chose {right}." in shown and voter.rates == "", "rates would sway the next votes"
    (vote,) = voter.cast
    assert (vote.left, vote.right, vote.choice) == (ballot.left, ballot.right, "right")
    voter.press(act="stop")
    assert "Win rates" in voter.rates and right in voter.rates


def test_names_wait_until_the_last_pair_of_the_same_answers(page):
    voter = Voter(page, page.admission.store.save(one("a", "b", "c")))
    voter.press(act="start")
    for _ in range(2):
        blind = voter.press(choice="tie")
        assert not any(name in blind for name in NAMES)
    shown = voter.press(choice="bad")
    assert all(name in shown for name in NAMES) and len(voter.cast) == 3
    assert "Win rates" in voter.press(act="next") + voter.rates and "all voted on by you" in voter.html


def test_a_browser_cannot_vote_twice_nor_after_it_saw_the_names(page):
    voter = Voter(page, page.admission.store.save(one("a", "b")))
    voter.press(choice="left")
    assert voter.cast == (), "a vote without a ballot"
    voter.press(act="start")
    voter.press(act="names")
    voter.press(choice="left")
    assert voter.cast == (), "a vote after the names"
    again = Voter(page, voter.poll.id or voter.shown.comparison.id)
    again.press(act="start")
    poll = again.poll
    again.press(choice="left")
    again.poll = poll  # the same page, sent a second time
    again.press(choice="right")
    assert len(again.cast) == 1 and again.cast[0].choice == "left"
    again.poll = poll
    assert "Start voting" not in again.press(choice="nonsense"), "nothing is left"
    assert len(again.cast) == 1


def test_a_refused_vote_shows_no_names(page):
    voter = Voter(page, page.admission.store.save(several(3)))
    voter.press(act="start")
    poll, ballot = voter.poll, voter.poll.ballot
    other = Voter(page, voter.shown.comparison.id)  # another tab of the same browser
    other.press(act="start")
    other.poll = poll
    other.press(choice="left")
    html = voter.press(choice="right")
    assert "already" in html and "data-voting" in html and not any(name in html for name in NAMES)
    assert voter.poll.is_open and voter.poll.ballot != ballot and len(voter.cast) == 1


def test_a_poll_on_another_comparison_does_not_vote_on_this_one(page):
    first, second = (page.admission.store.save(one("a", "b")) for _ in range(2))
    voter = Voter(page, first)
    voter.press(act="start")
    moved = Voter(page, second)
    moved.poll = voter.poll
    moved.press(choice="left")
    assert moved.cast == () and voter.cast == ()


def test_each_visitor_has_own_rates_beside_the_total(page):
    id = page.admission.store.save(one("a", "b"))
    for key in (KEY, OTHER):
        voter = Voter(page, id, key)
        voter.press(act="start")
        voter.press(choice="left")
    voter.press(act="stop")
    assert (
        "Blind votes: 2 by 2 visitors" in voter.rates
        and ">you<" in voter.rates
        and ">visitor 1<" in voter.rates
    )
    assert KEY not in str(voter.cast) and OTHER not in str(voter.cast)


def test_texts_of_a_stranger_stay_text(page):
    evil = "<img src=x onerror=alert(1)>"
    voter = Voter(page, page.admission.store.save(one(evil, "b")))
    assert "<img" not in voter.press(act="start") and "&lt;img" in voter.html


def test_what_cannot_be_voted_on_says_why(page):
    assert votes.NOTHING in offered(page, page.admission.shown(sample.comparison(cells=())), KEY)[0]
    assert votes.UNSAVED in offered(page, page.admission.shown(one("a", "b")), KEY)[0]
    same = Voter(page, page.admission.store.save(one("a", "a")))
    assert "nothing to vote on" in same.html and "1 more" in same.html
    assert offered(page, page.admission.shown(one("a", "b")), KEY)[2] == Poll()


def test_a_public_server_takes_so_many_votes_of_one_address(tmp_path):
    settings = Settings(data_dir=tmp_path / "data", public=True)
    page = Page(settings, Admission(settings))
    voter = Voter(page, page.admission.store.save(several(VOTES_PER_MINUTE + 2), OTHER))
    for _ in range(VOTES_PER_MINUTE):
        voter.press(act="start")
        voter.press(choice="left")
    assert len(voter.cast) == VOTES_PER_MINUTE, "anybody with the link may vote"
    voter.press(act="start")
    html = voter.press(choice="left")
    assert f"{VOTES_PER_MINUTE} votes in the last minute" in html and "data-voting" in html
    assert len(voter.cast) == VOTES_PER_MINUTE
    with open_store(settings) as store:
        assert len(store.load(voter.shown.comparison.id).votes.votes) == VOTES_PER_MINUTE


@pytest.mark.browser
@pytest.mark.parametrize(("width", "dark"), [(1440, False), pytest.param(390, True, marks=pytest.mark.slow)])
def test_voting_by_keyboard_hides_every_name(visit, saved, width, dark):
    id = saved.save(one("It scatters.", "Air scatters blue light.", "Blue."))
    visitor = visit(f"?c={id}&vote=1", width=width, dark=dark)
    page = visitor.page
    page.wait_for_selector("#ballot [data-choice]")
    page.wait_for_function("() => document.activeElement.matches('.ballot')")
    for hidden in ("#cards", "#summary"):
        assert not page.locator(hidden).is_visible(), f"{hidden} names the answers"
    ballot = page.locator("#ballot")
    assert not any(name in ballot.inner_html() for name in NAMES)
    assert not page_checks.violations(page, "#ballot") and not page_checks.sideways(page)
    visitor.tab("Latency")
    assert not page.locator('[data-table="latency"]').is_visible(), "another tab names the answers"
    visitor.tab("Votes")
    page.locator(".ballot").focus()
    for key in ("ArrowLeft", "3"):
        count = page.inner_text(".ballot [role=status]")
        page.keyboard.press(key)
        page.wait_for_function(
            "(before) => document.querySelector('.ballot [role=status]').innerText !== before"
            " && document.activeElement.matches('.ballot')",
            arg=count,
        )
    page.keyboard.press("2")
    page.wait_for_function("() => document.activeElement.matches('[data-act=next]')")
    assert all(name in ballot.inner_text() for name in NAMES)
    page.keyboard.press("Enter")
    page.wait_for_selector("#vote-results table")
    assert page.locator("#cards").is_visible() and "3 by 1 visitor" in visitor.text("#vote-results")
    assert not page_checks.violations(page, "#tabs") and not page_checks.sideways(page)
    assert [v.choice for v in saved.load(id).votes.votes] == ["left", "tie", "right"]
    assert not visitor.complaints, visitor.complaints
