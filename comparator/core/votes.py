"""Blind votes on pairs of answers: plain frozen dataclasses that pickle, part of the document where there are any."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

Choice = Literal["left", "right", "tie", "bad"]  # bad: both answers are
CHOICES: tuple[Choice, ...] = ("left", "right", "tie", "bad")
MOST_VOTES = 2_000  # on one comparison
_LONGEST_NAME = 64


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
class Votes:
    """`totals` are of all `votes`, written for whoever reads the document; this program computes them anew."""

    votes: tuple[Vote, ...] = ()
    totals: tuple[Standing, ...] = ()


def fits(votes: Votes, columns: int, prompts: int) -> bool:
    """Whether these votes can be of a comparison with so many columns and prompts."""
    return len(votes.votes) <= MOST_VOTES and all(
        0 <= v.prompt < prompts
        and 0 <= v.left < columns
        and 0 <= v.right < columns
        and v.left != v.right
        and len(v.visitor) <= _LONGEST_NAME
        for v in votes.votes
    )


def pseudonym(id: str, key: str) -> str:
    """The visitor with this key on the comparison `id`: cannot be traced back to the key, nor to other comparisons."""
    text = f"quant-comparator voter\0{id}\0{key}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(text).hexdigest()[:12]
