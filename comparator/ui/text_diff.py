"""Word-level difference of two texts."""

from __future__ import annotations

import re
from dataclasses import dataclass

_WORD = re.compile(r"\s+|\w+|[^\w\s]", re.UNICODE)


@dataclass(frozen=True)
class Piece:
    """A part of the text. `kind` is same, changed or missing; `other` is the reference's text there."""

    kind: str
    text: str
    other: str = ""


def split_words(text: str) -> list[str]:
    """Words, punctuation marks and white space, one item each; joined they give the text."""
    return _WORD.findall(text)


def differences(text: str, reference: str) -> list[Piece]:
    """The pieces of `text`; joined they give `text`. A missing piece has no text of its own."""
    from rapidfuzz.distance import Indel

    words, reference_words = split_words(text), split_words(reference)
    pieces: list[Piece] = []
    for step in Indel.opcodes(reference_words, words):
        added = "".join(words[step.dest_start : step.dest_end])
        removed = "".join(reference_words[step.src_start : step.src_end])
        if step.tag == "equal":
            pieces.append(Piece("same", added))
        elif step.tag == "insert":
            before = pieces[-1] if pieces else None
            if before and before.kind == "missing":  # a deletion next to an insertion is a change
                pieces[-1] = Piece("changed", added, before.other)
            else:
                pieces.append(Piece("changed", added))
        else:
            before = pieces[-1] if pieces else None
            if before and before.kind == "changed" and not before.other:
                pieces[-1] = Piece("changed", before.text, removed)
            else:
                pieces.append(Piece("missing", "", removed))
    return pieces


def changed_words(pieces: list[Piece]) -> tuple[int, int]:
    """(number of changed words, number of words); white space and punctuation do not count."""
    count = lambda text: sum(1 for word in split_words(text) if word[0].isalnum() or word[0] == "_")  # noqa: E731
    return sum(count(p.text) for p in pieces if p.kind == "changed"), sum(count(p.text) for p in pieces)
