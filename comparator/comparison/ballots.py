"""Blind votes: which two answers come next, and what makes a vote valid.

Identical answers are never voted on and are not counted. A visitor votes once on each pair of columns of a prompt.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from comparator.comparison.standings import standings
from comparator.core.errors import UserError
from comparator.core.prompt_set import SetAnswer
from comparator.core.result import Comparison
from comparator.core.votes import CHOICES, MOST_VOTES, Choice, Vote, Votes


@dataclass(frozen=True)
class Ballot:
    """Two answers to one prompt: columns by number, on the sides where they are shown."""

    prompt: int
    left: int
    right: int


@dataclass(frozen=True)
class Extent:
    """How many pairs of answers a comparison has, and how many of them are identical."""

    pairs: int
    identical: int


def answers(comparison: Comparison, prompt: int) -> tuple[str | None, ...]:
    """The columns' answers to a prompt; None for one that failed, was stopped or was not reached."""
    result = comparison.prompt_set
    if result is None:
        return tuple(cell.shown_text if cell.status == "ok" else None for cell in comparison.cells)
    column_answers = (column[prompt] for column in result.answers)
    return tuple(
        None if a is None or a.error is not None or a.finish_reason == "stopped" else _whole(a)
        for a in column_answers
    )


def _whole(answer: SetAnswer) -> str:
    """An answer; of a scripted conversation all of the column's own, numbered."""
    if not answer.earlier:
        return answer.text
    return "\n\n".join(f"({n}) {text}" for n, text in enumerate((*answer.earlier, answer.text), 1))


def turns(comparison: Comparison, prompt: int) -> list[tuple[str, str]]:
    """(who speaks, text) of every turn before the answers, the system prompt first; of a scripted conversation those that
    are the same for all columns."""
    if comparison.prompt_set is None:
        system, earlier, text = comparison.prompt.system, (), comparison.prompt.text
    else:
        of_set = comparison.prompt_set.prompts[prompt]
        system, earlier, text = of_set.system, of_set.history, of_set.text
    return [
        *([("system", system)] if system else []),
        *((m.role, m.content) for m in earlier),
        ("user", text),
    ]


def extent(comparison: Comparison) -> Extent:
    """How much there is to vote on."""
    texts = [[t for t in answers(comparison, n) if t is not None] for n in range(comparison.prompt_count)]
    pairs = [a == b for of_prompt in texts for a, b in combinations(of_prompt, 2)]
    return Extent(len(pairs), sum(pairs))


def left_for(
    comparison: Comparison, visitor: str, skipped: Sequence[Ballot] = ()
) -> list[tuple[int, int, int]]:
    """(prompt, column, column) of every pair that this visitor has not voted on, without those of `skipped`."""
    done = {_pair(v) for v in _votes(comparison) if v.visitor == visitor} | {_pair(b) for b in skipped}
    pairs = []
    for number in range(comparison.prompt_count):
        texts = answers(comparison, number)
        for a, b in combinations(range(len(texts)), 2):
            if None not in (texts[a], texts[b]) and texts[a] != texts[b] and (number, a, b) not in done:
                pairs.append((number, a, b))
    return pairs


def of_prompt(comparison: Comparison, visitor: str, prompt: int) -> tuple[Ballot, ...]:
    """The pairs of a prompt's answers that this visitor has not voted on, each as a ballot."""
    return tuple(Ballot(*pair) for pair in left_for(comparison, visitor) if pair[0] == prompt)


def next_ballot(
    comparison: Comparison, visitor: str, skipped: Sequence[Ballot] = (), chance: random.Random | None = None
) -> Ballot | None:
    """The pair that needs votes most, its sides at random; None where this visitor has voted on all.

    First the prompts that this visitor has voted on least, then the two columns that have met least, then the pair with
    the fewest votes. `skipped`: not these.
    """
    chance = chance or random.SystemRandom()
    votes = _votes(comparison)
    own = Counter(v.prompt for v in votes if v.visitor == visitor)
    met = Counter(_pair(v)[1:] for v in votes)
    on_pair = Counter(map(_pair, votes))
    pairs = left_for(comparison, visitor, skipped)
    if not pairs:
        return None
    chance.shuffle(pairs)
    prompt, *sides = min(pairs, key=lambda pair: (own[pair[0]], met[pair[1:]], on_pair[pair]))
    chance.shuffle(sides)
    return Ballot(prompt, *sides)


def names_wait(comparison: Comparison, visitor: str, prompt: int, skipped: Sequence[Ballot] = ()) -> bool:
    """Whether the names of a prompt's answers stay hidden after a vote: other pairs of the same answers come next, which
    the names would give away."""
    remaining = {number for number, _, _ in left_for(comparison, visitor, skipped)}
    return remaining == {prompt}


def cast(comparison: Comparison, ballot: Ballot, choice: Choice, visitor: str) -> Votes:
    """The comparison's votes with one more. Raises `UserError` for a vote that is not valid, or that is one too many."""
    votes = _votes(comparison)
    texts = answers(comparison, ballot.prompt) if 0 <= ballot.prompt < comparison.prompt_count else ()
    sides = (ballot.left, ballot.right)
    shown = [texts[side] for side in sides if 0 <= side < len(texts)]
    if choice not in CHOICES or len(shown) < 2 or None in shown or shown[0] == shown[1]:
        raise UserError("This pair of answers cannot be voted on.", "Continue with the next pair.")
    if any(v.visitor == visitor and _pair(v) == _pair(ballot) for v in votes):
        raise UserError("You have voted on this pair already.", "Continue with the next pair.")
    if len(votes) >= MOST_VOTES:
        raise UserError(
            f"This comparison has {MOST_VOTES:,} votes, the maximum.",
            "Run it again to collect new votes.",
        )
    more = (*votes, Vote(ballot.prompt, *sides, choice, visitor))
    return replace(comparison.votes or Votes(), votes=more, totals=standings(comparison, more))


def _votes(comparison: Comparison) -> tuple[Vote, ...]:
    return comparison.votes.votes if comparison.votes else ()


def _pair(of: Vote | Ballot) -> tuple[int, int, int]:
    return of.prompt, min(of.left, of.right), max(of.left, of.right)
