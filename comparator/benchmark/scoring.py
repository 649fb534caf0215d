"""What scoring costs beside the bare forward passes of the two models that it compares, in one run.

The two alternate on the same windows of the same text, so that whatever else the machine does affects both.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from comparator.core.errors import Stopped
from comparator.core.messages import LoadRequest
from comparator.core.request import EvalSettings
from comparator.core.variant import Variant
from comparator.engine.protocol import OnProgress, Task, TaskContext, ignore
from comparator.fidelity.tasks import EncodeText

if TYPE_CHECKING:
    from comparator.engine.protocol import Engine


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
    on_progress: OnProgress = ignore,
) -> ScoringSpeed:
    """`tokens` of the text are read, at most. Raises `UserError`, `Stopped`."""
    cancel, text = cancel or threading.Event(), text or EvalSettings()
    with engine.queue.turn(cancel, lambda ahead, _: on_progress(None, f"{ahead} ahead")):
        engine.open(model, cancel)
        handles: list[str] = []
        for wanted in (reference, variant):
            request = LoadRequest(model, wanted, keep=frozenset(handles))
            handles.append(engine.load(request, cancel, on_progress).handle)
        ids = engine.score(EncodeText(model, text), cancel)
        task = Race(handles[1], handles[0], ids[: tokens + 1], text.context, rounds)
        bare, scoring = engine.score(task, cancel, on_progress)
    ratios = tuple(b / s for b, s in zip(bare, scoring, strict=True))
    return ScoringSpeed(
        model, variant.notation, reference.notation, engine.state().device, len(task.token_ids) - 1, text.context,
        statistics.median(bare), statistics.median(scoring), statistics.median(ratios), ratios,
    )  # fmt: skip


def run(
    engine: Engine,
    model: str | None,
    variants: list[Variant],
    *,
    rounds: int = 5,
    on_progress: Callable[[str], None] = lambda message: None,
) -> list[ScoringSpeed]:
    """Each of the variants against the most precise of them, or against bf16 where there is one only."""
    from comparator.backends import most_precise, resolve
    from comparator.core.settings import get_settings

    reference = most_precise([*variants, resolve("bf16")] if len(variants) == 1 else variants)
    model = model or get_settings().model
    return [
        measure_scoring(
            engine, model, variant, reference, rounds=rounds,
            on_progress=lambda _, message, name=variant.notation: on_progress(f"{name}: {message}"),
        )
        for variant in variants
        if variant != reference
    ]  # fmt: skip


def table(results: list[ScoringSpeed]) -> str:
    """For a terminal: one line per pair."""
    lines = ["variant against reference    tokens  bare passes, s  scoring, s  ratio (rounds)"]
    for one in results:
        rounds = ", ".join(f"{r:.2f}" for r in one.ratios)
        lines.append(
            f"{one.variant + ' against ' + one.reference:27}  {one.tokens:6,}  {one.bare_s:14.2f}  "
            f"{one.scoring_s:10.2f}  {one.ratio:.2f} ({rounds})"
        )
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Race(Task):
    """Bare passes and scoring in alternation, on the engine's thread. Returns (bare seconds, scoring seconds) by round."""

    handle: str
    reference: str
    token_ids: tuple[int, ...]
    context: int
    rounds: int

    def run(
        self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress
    ) -> tuple[list[float], list[float]]:
        from comparator.fidelity import scoring
        from comparator.fidelity.eval_text import windows

        column, reference = context.slot(self.handle), context.slot(self.reference)
        device = column.device
        ids, cuts = list(self.token_ids), windows(len(self.token_ids), self.context, self.context)
        bare, scored = [], []
        for number in range(self.rounds + 1):  # the first is a warm-up
            if cancel.is_set():
                raise Stopped
            start = _now(device)
            for window in cuts:
                for one in (column, reference):
                    scoring.window_logits(one, ids, window, cancel)
            middle = _now(device)
            scoring.score_text(
                column, ids, self.context, self.context, reference, cancel, lambda s: None, with_floor=False
            )
            end = _now(device)
            if number:
                bare.append(middle - start)
                scored.append(end - middle)
            on_progress((number + 1) / (self.rounds + 1), f"round {number} of {self.rounds}")
        return bare, scored


def _now(device: str) -> float:
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)  # what was queued belongs to what queued it
    return time.perf_counter()
