"""Events of a running comparison: queued, loading, generating, scoring, finished, failed, done."""

from __future__ import annotations

from dataclasses import dataclass

from comparator.core.result import CellResult, Comparison
from comparator.core.variant import Cell


@dataclass(frozen=True)
class Chunk:
    """Text and token ids produced since the last chunk, with a timestamp (`time.perf_counter`, s) each."""

    text: str
    token_ids: tuple[int, ...]
    times_s: tuple[float, ...]


@dataclass(frozen=True)
class Queued:
    """`ahead` requests are served first. `doing`: what the running one does; "" if unknown."""

    ahead: int
    doing: str = ""


@dataclass(frozen=True)
class Loading:
    cell: Cell
    fraction: float | None
    message: str


@dataclass(frozen=True)
class Generating:
    """`round` counts a column's runs from 0; only the text of round 0 is displayed. `rounds`: how many runs there
    will be, as far as is known."""

    cell: Cell
    chunk: Chunk
    round: int = 0
    rounds: int = 1


@dataclass(frozen=True)
class Scoring:
    cell: Cell
    fraction: float | None
    message: str


@dataclass(frozen=True)
class Answering:
    """A prompt set, after the columns have finished: the prompt `number` (from 1) of `total` is answered. `left_s`: about how
    long the rest will take; None: not known yet."""

    cell: Cell
    number: int
    total: int
    left_s: float | None = None


@dataclass(frozen=True)
class Generated:
    """A column's preliminary result: text and figures, before later rounds and fidelity."""

    cell: Cell
    result: CellResult


@dataclass(frozen=True)
class Finished:
    cell: Cell
    result: CellResult


@dataclass(frozen=True)
class Failed:
    cell: Cell
    problem: str
    advice: str
    result: CellResult


@dataclass(frozen=True)
class Done:
    comparison: Comparison


Event = Queued | Loading | Generating | Scoring | Answering | Generated | Finished | Failed | Done
