"""Evaluates a trained adapter on its held-out samples: loss on each variant, without and with the adapter."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from comparator.core.errors import Stopped, UserError
from comparator.core.messages import LoadRequest
from comparator.core.result import ErrorInfo
from comparator.core.variant import Adapter, Cell
from comparator.engine.protocol import Engine, OnProgress, Task, TaskContext, ignore
from comparator.runtimes import ResidentModel
from comparator.training import artifact
from comparator.training.tokenize import MASKED, Encoded
from comparator.training.types import EvalRow, Evaluation, TrainingResult


@dataclass(frozen=True)
class ScoreSamples(Task):
    """One column's loss on samples. `run` returns (sum of the negative log-likelihoods in nats, number of tokens)."""

    handle: str
    adapter: Adapter | None
    samples: tuple[Encoded, ...]

    def run(
        self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress
    ) -> tuple[float, int]:
        total, tokens = 0.0, 0
        with context.column(self.handle, self.adapter) as column:
            for number, sample in enumerate(self.samples, 1):
                loss, count = sample_loss(column, sample, cancel)
                total, tokens = total + loss, tokens + count
                on_progress(number / len(self.samples), "held-out samples")
        return total, tokens


def sample_loss(column: ResidentModel, sample: Encoded, cancel: threading.Event) -> tuple[float, int]:
    """(summed negative log-likelihood of the trained-on tokens in nats, their number). Raises `Stopped`."""
    import torch

    with torch.inference_mode():
        logits = torch.as_tensor(column.window_logits(sample.ids, 0, cancel))
        labels = torch.tensor(sample.labels[1:], device=logits.device)
        positions = (labels != MASKED).nonzero().flatten()
        total = 0.0
        for chunk in positions.split(256):  # a float32 copy of all logits would be large
            scores = torch.log_softmax(logits[chunk].float(), -1)
            total -= float(scores.gather(1, labels[chunk].unsqueeze(1)).sum())
    return total, len(positions)


def evaluate(
    engine: Engine,
    path: Path,
    result: TrainingResult,
    variants: list[str],
    cancel: threading.Event,
    on_progress: OnProgress = ignore,
    on_row: Callable[[EvalRow], None] = ignore,
) -> Evaluation:
    """Measure every variant without and with the adapter in `path`; `on_row` gets each row as it is measured.

    `cancel` ends it with the rows so far. The result is saved with the adapter too. Raises `UserError` for a wrong
    request; if one variant fails, its row holds the problem.
    """
    from comparator.backends import resolve

    notations = list(dict.fromkeys(resolve(v).notation for v in variants))
    if not notations:
        raise UserError("No variant is selected.", "Name some, for example bf16 int8 nf4.")
    samples = artifact.read_heldout(path)
    if not samples:
        raise UserError(
            f"{result.name} has no held-out samples to evaluate on.",
            "Train with a held-out share, for example 0.1: training samples do not measure the result.",
        )
    rows: list[EvalRow] = []
    with (
        contextlib.suppress(Stopped),
        engine.queue.turn(
            cancel,
            lambda ahead, doing: on_progress(None, f"queued: {doing or f'{ahead} ahead'}"),
            lambda: (
                f"the evaluation of {result.name} is running, {len(rows)} of {2 * len(notations)} measurements"
            ),
        ),
    ):
        for notation in notations:
            for adapter in (None, Adapter(str(path))):
                if cancel.is_set():
                    raise Stopped
                rows.append(
                    _row(engine, result, Cell(resolve(notation), adapter), samples, cancel, on_progress)
                )
                on_row(rows[-1])
    evaluation = Evaluation(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        base=result.base,
        rows=tuple(rows),
        note="Stopped before all variants were measured." if cancel.is_set() else "",
    )
    if rows:
        with contextlib.suppress(UserError):  # a full disk does not lose the measurements
            artifact.remember_evaluation(path, evaluation)
    return evaluation


def _row(
    engine: Engine,
    result: TrainingResult,
    cell: Cell,
    samples: tuple[Encoded, ...],
    cancel: threading.Event,
    on_progress: OnProgress,
) -> EvalRow:
    """One column's row, with the problem if it failed. Raises `Stopped`."""
    notation, adapter_name = cell.variant.notation, result.name if cell.adapter else None
    label = f"{notation} + {result.name}" if cell.adapter else notation

    def progress(fraction: float | None, message: str) -> None:
        on_progress(fraction, f"{label}: {message}")

    try:
        engine.open(result.model, cancel, progress)
        variant = engine.complete(result.model, cell, cancel, progress).variant
        handle = engine.load(LoadRequest(result.model, variant, cell.adapter), cancel, progress).handle
        total, tokens = engine.score(ScoreSamples(handle, cell.adapter, samples), cancel, progress)
        mean = total / max(1, tokens)
        if not math.isfinite(mean):
            raise UserError(
                f"The logits of {label} contain NaN or infinity.", "Try dtype=bf16, or another variant."
            )
    except UserError as problem:
        error = ErrorInfo(problem.problem, problem.advice)
        return EvalRow(notation, adapter_name, None, None, problem=error)
    perplexity = math.exp(min(mean, 700.0))
    return EvalRow(variant.notation, adapter_name, mean, perplexity, tokens, len(samples))
