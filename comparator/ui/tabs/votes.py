"""The Votes tab: two answers without names, a vote, then the names; win rates of all visitors and of each.

Which columns the two answers are of is in a gr.State alone, which stays on the server until the names are shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from comparator.comparison import ballots
from comparator.comparison.ballots import Ballot
from comparator.core.errors import UserError
from comparator.core.result import Comparison
from comparator.core.votes import CHOICES, Choice, pseudonym
from comparator.reporting import votes
from comparator.store.voting import change_votes
from comparator.ui.admission import owner_of
from comparator.ui.form import Shown
from comparator.ui.gradio_compat import event_data
from comparator.ui.markup import esc, note, render
from comparator.ui.page import PRIVATE, Page, html
from comparator.ui.results.notice import problem
from comparator.ui.tabs import judge
from comparator.ui.tabs.rates import rates_table, text_table
from comparator.util import formatting

NOTHING = "Run two variants or more, or open a saved comparison, to vote on its answers without seeing whose they are."
WAITING = "Once all variants have answered, you can vote on their answers here without seeing whose they are."
UNSAVED = "This comparison is not saved on the server, so votes on it would be lost."


@dataclass(frozen=True)
class Poll:
    """One visitor's voting on one comparison. `ballot`: the pair that is shown; `waiting`: names to be shown after the
    last pair of these answers, by column."""

    id: str = ""
    ballot: Ballot | None = None
    voted: Choice | None = None  # on `ballot`
    is_open: bool = False  # `ballot` can be voted on; its names are not shown
    skipped: tuple[Ballot, ...] = ()
    waiting: tuple[int, ...] = ()


def build(page: Page) -> None:
    with gr.Tab("Votes", id="votes"):
        ballot = html(note(NOTHING), elem_id="ballot", js_on_load="qc.ballot(element, trigger)")
        results = html(elem_id="vote-results")
        poll = gr.State(Poll())
        judge.build(page)

    def offer(shown: Shown, owner: str):
        return offered(page, shown, owner)

    def act(shown: Shown, before: Poll, owner: str, event: gr.EventData, asker: gr.Request):
        return acted(page, shown, before, owner, event_data(event), asker)

    # Not `on_comparison`: the visitor's key belongs to the inputs, and a run that begins ends the voting.
    page.shown.change(offer, inputs=[page.shown, page.owner], outputs=[ballot, results, poll], **PRIVATE)
    ballot.submit(
        act, inputs=[page.shown, poll, page.owner], outputs=[ballot, results, poll], trigger_mode="once", **PRIVATE
    )  # fmt: skip


def offered(page: Page, shown: Shown, owner: Any, refusal: UserError | None = None) -> tuple[str, str, Poll]:
    """(what can be voted on and the button to begin, the win rates, no ballot)."""
    if shown.running:
        return note(WAITING), "", Poll()
    comparison = shown.comparison
    if comparison is None or len(comparison.cells) < 2:
        return note(NOTHING), "", Poll()
    if not page.admission.holds(comparison.id):
        return _unable(UNSAVED), win_rates(comparison, ""), Poll()
    visitor = visitor_of(comparison.id, owner)
    return start(comparison, visitor, refusal), win_rates(comparison, visitor), Poll()


def acted(
    page: Page, shown: Shown, before: Poll, owner: Any, event: Any, asker: Any
) -> tuple[str, str, Poll]:
    """One press of a button. `event` is what the browser sent: {"act": …} or {"choice": …}."""
    comparison = shown.comparison
    if comparison is None or not page.admission.holds(comparison.id):
        return offered(page, shown, owner)
    visitor = visitor_of(comparison.id, owner)
    poll = before if before.id == comparison.id else Poll(comparison.id)
    sent = event if isinstance(event, dict) else {}
    action, choice = sent.get("act"), sent.get("choice")
    try:
        if action == "stop":
            return offered(page, shown, owner)
        if poll.ballot and poll.is_open:
            if choice in CHOICES:
                page.admission.count_vote(asker)
                page.admission.require_room()
                comparison = cast(page, comparison, poll.ballot, choice, visitor)
                voted = replace(poll, voted=choice, is_open=False)
                return after_vote(page, shown, owner, comparison, visitor, voted)
            if action == "names":  # no vote on these answers would be blind now
                same = ballots.of_prompt(comparison, visitor, poll.ballot.prompt)
                poll = replace(poll, skipped=(*poll.skipped, *same), is_open=False)
                return revealed(comparison, visitor, poll), "", replace(poll, waiting=())
            if action == "skip":
                poll = replace(poll, skipped=(*poll.skipped, poll.ballot))
        return following(page, shown, owner, comparison, visitor, poll)
    except UserError as refusal:
        return refused(page, shown, owner, comparison, visitor, poll, refusal)


def refused(
    page: Page, shown: Shown, owner: Any, comparison: Comparison, visitor: str, poll: Poll, refusal: UserError
) -> tuple[str, str, Poll]:
    """Why a vote was not taken. The names stay hidden: the pair stays where it can still be voted on, else the next comes."""
    if poll.ballot is None or not poll.is_open or shown.comparison is None:
        return offered(page, shown, owner, refusal)
    pair = (poll.ballot.prompt, *sorted((poll.ballot.left, poll.ballot.right)))
    if pair in ballots.left_for(shown.comparison, visitor):
        return blind(comparison, visitor, poll, str(refusal)), "", poll
    return following(page, shown, owner, shown.comparison, visitor, poll, str(refusal))


def cast(page: Page, comparison: Comparison, ballot: Ballot, choice: Choice, visitor: str) -> Comparison:
    """The comparison with this vote, saved. Raises `UserError`."""
    return change_votes(
        page.admission.store, comparison.id, lambda now: ballots.cast(now, ballot, choice, visitor)
    )


def after_vote(page: Page, shown: Shown, owner: Any, comparison: Comparison, visitor: str, poll: Poll):
    """The names, or where they have to wait the next pair."""
    assert poll.ballot is not None
    if not ballots.names_wait(comparison, visitor, poll.ballot.prompt, poll.skipped):
        return revealed(comparison, visitor, poll), "", replace(poll, waiting=())
    sides = (poll.ballot.left, poll.ballot.right)
    waiting = replace(poll, waiting=tuple(dict.fromkeys((*poll.waiting, *sides))))
    noted = "Vote recorded; the names are shown after the last pair of these answers."
    return following(page, shown, owner, comparison, visitor, waiting, noted)


def following(
    page: Page, shown: Shown, owner: Any, comparison: Comparison, visitor: str, poll: Poll, status: str = ""
) -> tuple[str, str, Poll]:
    """The next pair, or the win rates where there is none."""
    ballot = ballots.next_ballot(comparison, visitor, poll.skipped)
    if ballot is None:
        return offered(page, shown, owner)
    poll = replace(poll, ballot=ballot, voted=None, is_open=True)
    return blind(comparison, visitor, poll, status), "", poll


# ---------------------------------------------------------------- how it looks


def start(comparison: Comparison, visitor: str, refusal: UserError | None = None) -> str:
    """What there is to vote on, and the button to begin."""
    line = problem(refusal) if refusal else ""
    extent, left = ballots.extent(comparison), len(ballots.left_for(comparison, visitor))
    if extent.pairs == extent.identical:
        return line + _unable(f"There is nothing to vote on: {votes.extent_words(comparison)}.")
    words = f"You see two answers to one prompt, without names, and choose the better one. {votes.extent_words(comparison)}"
    done = "" if left == extent.pairs - extent.identical else (
        f", {left:,} not voted on by you" if left else ", all voted on by you"
    )  # fmt: skip
    begin = '<button type="button" class="tool" data-act="start">Start voting</button>' if left else ""
    link = (
        f'<button type="button" class="quiet" data-vote-link="{esc(comparison.id)}" title="Opens this comparison with its '
        'names hidden">Copy link for voters</button>'
    )
    return f'{line}{note(esc(words + done) + ".")}<div class="ballot-start">{begin}{link}</div>'


def _unable(text: str) -> str:
    """Why there is no button; votes.js takes `ballot-start` for the end of waiting."""
    return f'<div class="ballot-start">{note(esc(text))}</div>'


def blind(comparison: Comparison, visitor: str, poll: Poll, status: str = "") -> str:
    """The pair of `poll.ballot`, without names."""
    left = len(ballots.left_for(comparison, visitor, poll.skipped))
    count = f"{formatting.plural(left, 'pair')} to vote on."
    return _ballot(comparison, poll, ("", ""), f"{status} {count}".strip(), more=True)


def revealed(comparison: Comparison, visitor: str, poll: Poll) -> str:
    """The pair that was voted on with its names, and those that have waited."""
    assert poll.ballot is not None
    labels = [cell.label for cell in comparison.cells]
    sides = (poll.ballot.left, poll.ballot.right)
    names = labels[sides[0]], labels[sides[1]]
    chosen = {"left": f"You chose {names[0]}.", "right": f"You chose {names[1]}.", "tie": "You called it a tie.",
            "bad": "You called both bad."}  # fmt: skip
    others = [labels[n] for n in poll.waiting if n not in sides]
    also = f" The other{'s were' if others[1:] else ' was'} {formatting.join(others)}." if others else ""
    status = f"{chosen.get(poll.voted or '', 'Not voted on.')}{also}"
    more = ballots.next_ballot(comparison, visitor, poll.skipped) is not None
    return _ballot(comparison, poll, names, status, more=more)


def _ballot(comparison: Comparison, poll: Poll, names: tuple[str, str], status: str, *, more: bool) -> str:
    assert poll.ballot is not None
    texts = ballots.answers(comparison, poll.ballot.prompt)
    sides = [
        {"title": title, "text": texts[number], "name": name, "chosen": poll.voted == title.lower()}
        for title, number, name in zip(
            ("Left", "Right"), (poll.ballot.left, poll.ballot.right), names, strict=True
        )
    ]
    return render(
        "ballot.html", sides=sides, names=any(names), status=status, more=more,
        turns=ballots.turns(comparison, poll.ballot.prompt),
    )  # fmt: skip


def win_rates(comparison: Comparison, visitor: str) -> str:
    """The win rates of all votes and of each visitor's; "" without a vote."""
    if not votes.title(comparison):
        return ""
    totals = rates_table(comparison, votes.totals(comparison), votes.title(comparison), "votes")
    visitors = votes.visitor_rows(comparison, visitor)
    each = ""
    if len(visitors) > 1 or visitors[0][0] != "you":
        head = votes.visitor_head(comparison)
        each = text_table(head, visitors, "Win rates by visitor", "voters", numeric=True)
    return f"<h3>Win rates</h3>{totals}{each}{note(esc(votes.RULE))}"


def visitor_of(id: str, owner: Any) -> str:
    """The pseudonym on this comparison of the visitor whose browser sent this key."""
    return pseudonym(id, owner_of(owner) or "page")
