"""“Trained on nf4, how does it do on bf16, int8, GPTQ?” The held-back samples, on every variant, without and with it."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from comparator.messages import Loaded, Progress
from comparator.training import folder
from comparator.training.tokens import MASKED, Encoded
from comparator.training.types import EvalRow, Evaluation, TrainingResult
from comparator.types import Adapter, Cell, ErrorInfo, Problem, Stopped


@dataclass(frozen=True)
class ScoreSamples:
    """One column's loss on samples. Gives (sum of the negative log-likelihoods in nats, tokens)."""

    handle: str
    adapter: Adapter | None
    name: str
    samples: tuple[Encoded, ...]

    def run(self, door: Any, cancel: threading.Event, told: Callable) -> tuple[float, int]:
        slot = door.slot(self.handle)
        total, tokens = 0.0, 0
        with door.wearing(slot, self.adapter) as model:
            for number, sample in enumerate(self.samples):
                loss, count = sample_loss(model, sample, cancel)
                total, tokens = total + loss, tokens + count
                told((number + 1) / len(self.samples), f"{self.name}: held-back samples")
        return total, tokens


def sample_loss(model: Any, sample: Encoded, cancel: threading.Event) -> tuple[float, int]:
    """(negative log-likelihood of the learnt tokens, how many). One forward pass; raises `Stopped`."""
    import torch

    from comparator.generate import input_device, interruptible

    ids = torch.tensor([sample.ids], dtype=torch.long, device=input_device(model))
    with torch.inference_mode(), interruptible(model, cancel):
        logits = model(input_ids=ids, use_cache=False, return_dict=True).logits[0]
        labels = torch.tensor(sample.labels[1:], device=logits.device)
        places = (labels != MASKED).nonzero().flatten()
        total = 0.0
        for some in places.split(256):  # float32 copies of a large vocabulary add up
            scores = torch.log_softmax(logits[some].float(), -1)
            total -= float(scores.gather(1, labels[some].unsqueeze(1)).sum())
    return total, len(places)


def evaluate(
    engine: Any, path: Path, result: TrainingResult, variants: list[str], cancel: threading.Event
) -> Iterator[Progress | EvalRow | Evaluation]:
    """Raises `Problem` for a request that is wrong; a variant's own trouble is its row's."""
    from comparator.backends import resolve

    wanted = list(dict.fromkeys(resolve(v).notation for v in variants))
    if not wanted:
        raise Problem("No variant is chosen.", "Name some: bf16 int8 nf4.")
    samples = folder.read_held(path)
    if not samples:
        raise Problem(
            f"{result.name} has no held-back samples to be measured on.",
            "Train with a share held back (0.1, say): what was trained on tells nothing.",
        )
    return _evaluating(engine, path, result, wanted, samples, cancel)


def _evaluating(engine, path, result, wanted, samples, cancel) -> Iterator[Any]:
    rows: list[EvalRow] = []
    name = result.name
    ticket = engine.turns.enter(
        lambda: f"the evaluation of {name} is running, {len(rows)} of {2 * len(wanted)} columns"
    )
    try:
        for ahead in engine.turns.wait(ticket, cancel):
            yield Progress(None, f"waiting: {engine.turns.doing or f'{ahead} ahead'}")
        adapter = Adapter(str(path))
        for notation in wanted:
            for worn in (None, adapter):
                if cancel.is_set():
                    break
                label = name if worn else None
                try:
                    for item in _column(engine, result.model, notation, worn, name, samples, cancel):
                        if isinstance(item, EvalRow):
                            rows.append(item)
                        yield item
                except Stopped:
                    break
                except Problem as problem:
                    error = ErrorInfo(problem.problem, problem.advice)
                    rows.append(EvalRow(notation, label, None, None, problem=error))
                    yield rows[-1]
    finally:
        engine.turns.leave(ticket)
    made = Evaluation(
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        base=result.base,
        rows=tuple(rows),
        note="Stopped before every column was measured." if cancel.is_set() else "",
    )
    if rows:
        with contextlib.suppress(Problem):  # a full disk does not cost what was measured
            folder.remember_evaluation(path, made)
    yield made


def _column(engine, model, notation, worn, name, samples, cancel) -> Iterator[Progress | EvalRow]:
    from comparator.backends import resolve

    shown = f"{notation} + {name}" if worn else notation
    cell = Cell(resolve(notation), worn)
    loaded = None
    for item in engine.open(model, cancel):
        if isinstance(item, Progress):
            yield Progress(item.fraction, f"{shown}: {item.message}")
    for item in engine.complete(model, cell, cancel):
        if isinstance(item, Cell):
            cell = item
        else:
            yield Progress(item.fraction, f"{shown}: {item.message}")
    for item in engine.load(model, cell.variant, cancel, adapter=worn):
        if isinstance(item, Loaded):
            loaded = item
        else:
            yield Progress(item.fraction, f"{shown}: {item.message}")
    for item in engine.score(ScoreSamples(loaded.handle, worn, shown, samples), cancel):
        if isinstance(item, Progress):
            yield item
        else:
            total, tokens = item
    mean = total / max(1, tokens)
    if not math.isfinite(mean):
        raise Problem(f"The logits of {shown} hold NaN or infinity.", "Try dtype=bf16, or another variant.")
    yield EvalRow(
        cell.variant.notation, name if worn else None, mean, math.exp(min(mean, 700.0)), tokens, len(samples)
    )
