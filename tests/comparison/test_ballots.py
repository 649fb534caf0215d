"""Which pairs are put to the vote, in which order, and what a vote counts."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import sample

from comparator.comparison import ballots, standings
from comparator.comparison.ballots import Ballot
from comparator.core import votes as core_votes
from comparator.core.errors import UserError
from comparator.core.prompt_set import Message, SetAnswer, SetPrompt, SetResult
from comparator.core.result import CellResult, Comparison
from comparator.core.votes import Vote, Votes


def of_set(*columns: tuple[str | None, ...]) -> Comparison:
    """A prompt set whose columns answered these texts; None: an error."""
    cells = tuple(CellResult(f"v{n}") for n in range(len(columns)))
    prompts = tuple(SetPrompt(f"p{n}", f"Question {n}?") for n in range(len(columns[0])))
    answers = tuple(
        tuple(SetAnswer(error="No memory.") if text is None else SetAnswer(text, 1, "eos") for text in column)
        for column in columns
    )
    return sample.comparison(
        schema=2, cells=cells, reference=None, prompt_set=SetResult("own", prompts, answers)
    )


def of_one(*texts: str) -> Comparison:
    cells = tuple(CellResult(f"v{n}", text=text) for n, text in enumerate(texts))
    return sample.comparison(cells=cells, reference=None)


def voted(
    comparison: Comparison, visitor: str, choose=lambda ballot: "left", count: int = 10_000
) -> Comparison:
    """The comparison after this visitor's votes, as far as there is a pair."""
    chance = random.Random(1)
    for _ in range(count):
        ballot = ballots.next_ballot(comparison, visitor, chance=chance)
        if ballot is None:
            break
        comparison = replace(comparison, votes=ballots.cast(comparison, ballot, choose(ballot), visitor))
    return comparison


def test_identical_and_missing_answers_are_not_put_to_the_vote():
    comparison = of_set(("a", "b", "c", "d"), ("a", "x", None, "d"), ("y", "b", "z", "d"))
    assert ballots.extent(comparison) == ballots.Extent(10, 5)
    asked = {(v.prompt, frozenset((v.left, v.right))) for v in voted(comparison, "v").votes.votes}
    assert asked == {
        (0, frozenset((0, 2))), (0, frozenset((1, 2))), (1, frozenset((0, 1))), (1, frozenset((1, 2))),
        (2, frozenset((0, 2))),
    }  # fmt: skip
    failed = replace(
        sample.comparison(), cells=(sample.REFERENCE, replace(sample.NF4, status="stopped"), sample.FAILED)
    )
    assert ballots.extent(failed) == ballots.Extent(0, 0), "a stopped answer is not whole"


def test_a_visitor_goes_through_all_prompts_before_one_comes_again():
    comparison = of_set(*(tuple(f"{column}{n}" for n in range(6)) for column in "abc"))
    order = [v.prompt for v in voted(comparison, "v").votes.votes]
    assert len(order) == 18 and sorted(order[:6]) == sorted(order[6:12]) == list(range(6))


def test_the_pairs_with_the_fewest_votes_come_first_whoever_votes():
    comparison = of_set(*(tuple(f"{column}{n}" for n in range(4)) for column in "abc"))
    for visitor in ("one", "two", "three"):
        comparison = voted(comparison, visitor, count=4)
    met = Counter(frozenset((v.left, v.right)) for v in comparison.votes.votes)
    assert set(met.values()) == {4}, "twelve votes, three pairs of columns"


def test_sides_are_random():
    comparison, chance = of_one("a", "b"), random.Random(5)
    lefts = Counter(ballots.next_ballot(comparison, "v", chance=chance).left for _ in range(200))
    assert 70 < lefts[0] < 130


def test_skipped_pairs_do_not_come_again():
    comparison = of_one("a", "b")
    ballot = ballots.next_ballot(comparison, "v")
    assert ballots.next_ballot(comparison, "v", [Ballot(0, ballot.right, ballot.left)]) is None


def test_names_wait_while_the_same_answers_come_again_next():
    one = of_one("a", "b", "c")
    after = voted(one, "v", count=1)
    assert ballots.names_wait(after, "v", 0) and not ballots.names_wait(voted(one, "v"), "v", 0)
    assert not ballots.names_wait(voted(of_one("a", "b"), "v"), "v", 0)
    many = voted(of_set(*(("a", "b"), ("c", "d"), ("e", "f"))), "v", count=1)
    assert not ballots.names_wait(many, "v", many.votes.votes[0].prompt), "another prompt comes in between"


def test_turns_are_all_that_the_model_was_sent():
    prompt = SetPrompt(
        "p",
        "And now?",
        "Be brief.",
        (Message("user", "Hello"), Message("assistant", "Hi")),
        choices=("x", "y"),
    )
    comparison = replace(of_set(("a",), ("b",)), prompt_set=SetResult("own", (prompt,), ()))
    assert ballots.turns(comparison, 0) == [
        ("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"), ("user", prompt.text),
    ]  # fmt: skip
    assert ballots.turns(sample.comparison(), 0) == [
        ("system", "Be brief."),
        ("user", "What is the capital of France?"),
    ]


def test_a_scripted_conversation_is_voted_on_as_a_whole():
    prompt = SetPrompt("p", "And now?", history=(Message("user", "Hello"),))
    columns = tuple((SetAnswer("Same.", 1, "eos", earlier=(first,)),) for first in ("Hi!", "Hey."))
    comparison = replace(of_set(("a",), ("b",)), prompt_set=SetResult("own", (prompt,), columns))
    assert ballots.answers(comparison, 0) == ("(1) Hi!\n\n(2) Same.", "(1) Hey.\n\n(2) Same.")
    assert ballots.turns(comparison, 0) == [("user", "Hello"), ("user", "And now?")]
    assert ballots.extent(comparison) == ballots.Extent(1, 0)


@pytest.mark.parametrize(
    "ballot",
    [Ballot(0, 0, 0), Ballot(0, 0, 3), Ballot(0, -1, 0), Ballot(1, 0, 1), Ballot(-1, 0, 1), Ballot(0, 0, 2)],
)
def test_a_vote_on_what_is_no_pair_is_refused(ballot):
    with pytest.raises(UserError, match="cannot be voted on"):
        ballots.cast(of_one("a", "b", "a"), ballot, "left", "v")


def test_a_choice_that_is_none_is_refused():
    with pytest.raises(UserError, match="cannot be voted on"):
        ballots.cast(of_one("a", "b"), Ballot(0, 0, 1), "both", "v")


def test_one_vote_per_visitor_and_pair_and_so_many_per_comparison(monkeypatch):
    comparison = voted(of_one("a", "b"), "one")
    with pytest.raises(UserError, match="already"):
        ballots.cast(comparison, Ballot(0, 1, 0), "left", "one")
    assert len(ballots.cast(comparison, Ballot(0, 1, 0), "left", "two").votes) == 2
    monkeypatch.setattr(ballots, "MOST_VOTES", 1)
    with pytest.raises(UserError, match="1 votes"):
        ballots.cast(comparison, Ballot(0, 1, 0), "left", "two")


def test_standings_count_from_the_side_where_a_column_was_shown():
    cast = [
        Vote(0, 0, 1, "left", "a"), Vote(0, 1, 0, "right", "b"), Vote(0, 1, 0, "left", "c"), Vote(0, 0, 1, "tie", "d"),
        Vote(0, 1, 0, "bad", "e"),
    ]  # fmt: skip
    comparison = replace(of_one("a", "b", "c"), votes=Votes(tuple(cast)))
    first, second = standings.standings(comparison)
    assert (first.label, first.votes, first.won, first.lost, first.tied, first.bad) == ("v0", 5, 2, 1, 1, 1)
    assert (second.label, second.votes, second.won, second.lost, second.tied, second.bad) == (
        "v1",
        5,
        1,
        2,
        1,
        1,
    )
    assert (first.rate, second.rate) == (0.6, 0.4) and first.low < 0.6 < first.high
    own = standings.by_visitor(comparison)
    assert list(own) == list("abcde") and own["c"][0].rate == 0.0 and own["c"][0].high > 0.5


def test_a_pseudonym_differs_by_comparison_and_says_nothing_of_the_key():
    key = "k" * 22
    names = {core_votes.pseudonym(id, key) for id in ("one", "two")}
    assert len(names) == 2 and not any(key[:4] in name for name in names)
