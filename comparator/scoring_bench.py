"""What scoring costs beside the bare forward passes of the two models that it compares, in one run.

The two take turns on the same windows of the same text, so that whatever else the machine does falls on both.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from comparator.scoring_tasks import Door, EncodeText, Told
from comparator.types import Cell, EvalSettings, Scoring, Stopped, Variant

if TYPE_CHECKING:
    from comparator.engine import Engine


@dataclass(frozen=True)
class ScoringSpeed:
    """`ratio`: bare over scoring time, the median of the rounds; 1 would mean that comparing costs nothing."""

    model: str
    variant: str
    reference: str
    device: str
    tokens: int
    context: int
    bare_s: float
    scoring_s: float
    ratio: float
    ratios: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure_scoring(
    engine: Engine,
    model: str,
    variant: Variant,
    reference: Variant,
    *,
    text: EvalSettings | None = None,
    tokens: int = 2048,
    rounds: int = 5,
    cancel: threading.Event | None = None,
) -> Iterator[Scoring | ScoringSpeed]:
    """Yields progress, last a `ScoringSpeed`. `tokens` of the text are read, at most. Raises `Problem`, `Stopped`."""
    from comparator.engine import Loaded, Progress

    cancel, given, cell = cancel or threading.Event(), text or EvalSettings(), Cell(variant)
    ticket = engine.turns.enter()
    try:
        for ahead in engine.turns.wait(ticket, cancel):
            yield Scoring(cell, None, f"{ahead} ahead")
        for _ in engine.open(model, cancel):
            pass
        handles: list[str] = []
        for wanted in (reference, variant):
            for item in engine.load(model, wanted, cancel, keep=frozenset(handles)):
                if isinstance(item, Loaded):
                    handles.append(item.handle)
                else:
                    yield Scoring(cell, item.fraction, f"{wanted.notation}: {item.message}")
        (ids,) = engine.score(EncodeText(model, given), cancel)
        work = Race(handles[1], handles[0], ids[: tokens + 1], given.context, rounds)
        for item in engine.score(work, cancel):
            if isinstance(item, Progress):
                yield Scoring(cell, item.fraction, item.message)
                continue
            bare, scoring = item
            ratios = tuple(b / s for b, s in zip(bare, scoring, strict=True))
            yield ScoringSpeed(
                model, variant.notation, reference.notation, engine.state().device, len(work.token_ids) - 1,
                given.context, statistics.median(bare), statistics.median(scoring), statistics.median(ratios), ratios,
            )  # fmt: skip
    finally:
        engine.turns.leave(ticket)


def run(
    model: str | None,
    variants: list[Variant],
    *,
    rounds: int = 5,
    told: Callable[[str], None] = lambda message: None,
) -> list[ScoringSpeed]:
    """Each of the variants against the most precise of them, or against bf16 where there is one only."""
    from comparator.backends import most_precise, resolve
    from comparator.engine import get_engine
    from comparator.settings import get_settings

    reference = most_precise([*variants, resolve("bf16")] if len(variants) == 1 else variants)
    found = []
    for variant in variants:
        if variant == reference:
            continue
        for item in measure_scoring(
            get_engine(), model or get_settings().model, variant, reference, rounds=rounds
        ):
            if isinstance(item, Scoring):
                told(f"{variant.notation}: {item.message}")
            else:
                found.append(item)
    return found


def table(found: list[ScoringSpeed]) -> str:
    """For a terminal: a line a pair."""
    lines = ["variant against reference    tokens  bare passes, s  scoring, s  ratio (rounds)"]
    for one in found:
        rounds = ", ".join(f"{r:.2f}" for r in one.ratios)
        lines.append(
            f"{one.variant + ' against ' + one.reference:27}  {one.tokens:6,}  {one.bare_s:14.2f}  "
            f"{one.scoring_s:10.2f}  {one.ratio:.2f} ({rounds})"
        )
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Race:
    """Bare passes and scoring by turns, on the engine's thread. Gives (bare seconds, scoring seconds) by round."""

    handle: str
    reference: str
    token_ids: tuple[int, ...]
    context: int
    rounds: int

    def run(self, door: Door, cancel: threading.Event, told: Told) -> tuple[list[float], list[float]]:
        from comparator import scoring
        from comparator.evaluation import windows

        model, reference = (door.slot(h).model for h in (self.handle, self.reference))
        device = door.slot(self.handle).device
        ids, cuts = list(self.token_ids), windows(len(self.token_ids), self.context, self.context)
        bare, scored = [], []
        for number in range(self.rounds + 1):  # the first is a warm-up
            if cancel.is_set():
                raise Stopped
            start = _now(device)
            for window in cuts:
                for one in (model, reference):
                    scoring.window_logits(one, ids, window, cancel)
            middle = _now(device)
            scoring.score_text(
                model, ids, self.context, self.context, reference, cancel, lambda s: None, with_floor=False
            )
            end = _now(device)
            if number:
                bare.append(middle - start)
                scored.append(end - middle)
            told((number + 1) / (self.rounds + 1), f"round {number} of {self.rounds}")
        return bare, scored


def _now(device: str) -> float:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)  # what was queued belongs to what queued it
    return time.perf_counter()
