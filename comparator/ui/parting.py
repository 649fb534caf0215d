"""Where two answers part: the token, the two candidates there, and how likely either was to both columns.

Up to there both columns have read the same tokens, so the reference's scored answer has both distributions at that place.
"""

from __future__ import annotations

from dataclasses import dataclass

from comparator.core.result import CellResult, PromptFidelity, TopToken


@dataclass(frozen=True)
class Candidate:
    """A token and its probability in the reference and in the column; None: not among the most likely that are kept."""

    token: str
    reference_p: float | None
    p: float | None


@dataclass(frozen=True)
class Parting:
    """`position`: index of the first token that differs. Candidates are None where the column was not scored there."""

    position: int
    reference: Candidate | None = None
    column: Candidate | None = None


def parting(cell: CellResult, reference: CellResult) -> Parting | None:
    """Where the answer of a column leaves that of the reference; None where all tokens are the same."""
    mine, theirs = cell.token_ids, reference.token_ids
    position = next(
        (n for n, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs))
    )
    if position == len(mine) == len(theirs):
        return None
    prompt = cell.fidelity.prompt if cell.fidelity else None
    if prompt is None or position >= min(len(prompt.tokens), len(prompt.top), len(prompt.p)):
        return Parting(position)
    return Parting(position, _theirs(prompt, position), _mine(prompt, position, cell.text))


def _theirs(prompt: PromptFidelity, at: int) -> Candidate:
    reference_p = prompt.reference_p[at] if at < len(prompt.reference_p) else None
    return Candidate(prompt.tokens[at], reference_p, prompt.p[at])


def _mine(prompt: PromptFidelity, at: int, text: str) -> Candidate | None:
    """The column's own next token: the longest of its most likely tokens with which its answer continues."""
    rest = text[len("".join(prompt.tokens[:at])) :]
    fitting = [
        t for t in prompt.top[at] if t.token and t.token != prompt.tokens[at] and rest.startswith(t.token)
    ]
    if not fitting:
        return None
    chosen = max(fitting, key=lambda t: len(t.token))
    listed: tuple[TopToken, ...] = prompt.reference_top[at] if at < len(prompt.reference_top) else ()
    return Candidate(chosen.token, next((t.p for t in listed if t.token == chosen.token), None), chosen.p)
