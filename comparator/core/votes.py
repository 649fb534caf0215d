"""Blind votes on pairs of answers: plain frozen dataclasses that pickle, part of the document where there are any."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Choice = Literal["left", "right", "tie", "bad"]  # bad: both answers are
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "bad")
MOST_VOTES = 2_000  # on one comparison
MOST_JUDGEMENTS = 400  # on one comparison, of all judges
MOST_JUDGES = 8
LONGEST_REASON = 300  # characters
_LONGEST_NAME = 64
_LONGEST_INSTRUCTIONS = 4_000


@dataclass(frozen=True)
class Vote:
    """What one visitor said of two answers to one prompt.

    Attributes:
        prompt: its number in the prompt set, from 0; 0 without a set.
        left, right: columns by their number in the document, on the sides where they were shown.
        visitor: from `pseudonym`.
    """

    prompt: int
    left: int
    right: int
    choice: Choice
    visitor: str


@dataclass(frozen=True)
class Standing:
    """The votes on one column. `bad`: votes that called both answers bad, which count as ties for the rate.

    `rate`: share won, a tie as half, and `low` and `high` its 95 % interval; comparator/comparison/standings.py defines them.
    """

    label: str
    votes: int
    won: int
    lost: int
    tied: int
    bad: int
    rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Judgement:
    """What a judge model said of two answers, asked twice.

    Attributes:
        prompt, left, right: as in `Vote`; `left` was answer A the first time, and answer B the second.
        first, second: which side it chose each time; None where its text has no verdict.
        reasons: what it wrote before each verdict, at most LONGEST_REASON characters.
    """

    prompt: int
    left: int
    right: int
    first: Choice | None
    second: Choice | None
    reasons: tuple[str, str] = ("", "")

    @property
    def choice(self) -> Choice | None:
        """Its verdict: a tie where the two orders disagree, None without a verdict in both."""
        if self.first is None or self.second is None:
            return None
        return self.first if self.first == self.second else "tie"


@dataclass(frozen=True)
class Judge:
    """A judge model's verdicts. `column`: the judge's label, `instructions`: the prompt that it got, with its places for
    request and answers."""

    model: str
    column: str
    instructions: str
    judgements: tuple[Judgement, ...] = ()


@dataclass(frozen=True)
class Votes:
    """`totals` are of all `votes`, written for whoever reads the document; this program computes them again."""

    votes: tuple[Vote, ...] = ()
    totals: tuple[Standing, ...] = ()
    judges: tuple[Judge, ...] = ()


def fits(votes: Votes, columns: int, prompts: int) -> bool:
    """Whether these votes can be of a comparison with so many columns and prompts."""
    judgements = [j for judge in votes.judges for j in judge.judgements]
    texts = [text for j in judgements for text in j.reasons]
    return (
        len(votes.votes) <= MOST_VOTES
        and len(judgements) <= MOST_JUDGEMENTS
        and len(votes.judges) <= MOST_JUDGES
        and all(len(v.visitor) <= _LONGEST_NAME for v in votes.votes)
        and all(len(text) <= LONGEST_REASON for text in texts)
        and all(len(j.model + j.column + j.instructions) <= _LONGEST_INSTRUCTIONS for j in votes.judges)
        and all(
            0 <= v.prompt < prompts and 0 <= v.left < columns and 0 <= v.right < columns and v.left != v.right
            for v in (*votes.votes, *judgements)
        )
    )


def pseudonym(id: str, key: str) -> str:
    """The visitor with this key on the comparison `id`: cannot be traced back to the key, nor to other comparisons."""
    text = f"quant-comparator voter\0{id}\0{key}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:12]
