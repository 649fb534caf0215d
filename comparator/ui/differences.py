"""Two texts → where one differs from the other, by word. Knows nothing of pages: it returns plain pieces."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WORD = re.compile(r"\s+|\w+|[^\w\s]", re.UNICODE)


@dataclass(frozen=True)
class Piece:
    """A stretch of the text. `kind` is same, changed or missing; `other` is what the reference has instead."""

    kind: str
    text: str
    other: str = ""


def split_words(text: str) -> list[str]:
    """Words, marks and white space, one item each; joined they are the text again."""
    return _WORD.findall(text)


def differences(text: str, reference: str) -> list[Piece]:
    """The pieces of `text`; their texts joined are `text` again. A missing piece has no text of its own."""
    from rapidfuzz.distance import Indel

    mine, theirs = split_words(text), split_words(reference)
    pieces: list[Piece] = []
    for step in Indel.opcodes(theirs, mine):
        here = "".join(mine[step.dest_start : step.dest_end])
        there = "".join(theirs[step.src_start : step.src_end])
        if step.tag == "equal":
            pieces.append(Piece("same", here))
        elif step.tag == "insert":
            before = pieces[-1] if pieces else None
            if before and before.kind == "missing":  # a deletion beside an insertion is a change
                pieces[-1] = Piece("changed", here, before.other)
            else:
                pieces.append(Piece("changed", here))
        else:
            before = pieces[-1] if pieces else None
            if before and before.kind == "changed" and not before.other:
                pieces[-1] = Piece("changed", before.text, there)
            else:
                pieces.append(Piece("missing", "", there))
    return pieces


def changed_words(pieces: list[Piece]) -> tuple[int, int]:
    """(words of the text that differ, words of the text); white space and marks are not words."""
    count = lambda text: sum(1 for word in split_words(text) if word[0].isalnum() or word[0] == "_")  # noqa: E731
    return sum(count(p.text) for p in pieces if p.kind == "changed"), sum(count(p.text) for p in pieces)
