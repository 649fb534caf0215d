"""Sweep: speed, latency and memory of variants over batch sizes and contexts, measured on this machine.

How a point is measured: points.py.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from comparator.capacity.points import MeasurePoint, Options, Point
from comparator.core.errors import Stopped, UserError
from comparator.core.messages import LoadRequest
from comparator.core.result import Environment
from comparator.core.state import ModelFacts
from comparator.core.variant import Cell, Variant
from comparator.engine.protocol import Engine, OnProgress, ignore
from comparator.util import formatting
from comparator.util.streams import stopped_after


@dataclass
class Sweep:
    """What was measured. `stopped`: before all `total` points were."""

    model: str
    parameters: int | None
    options: Options
    environment: Environment
    total: int
    points: list[Point] = field(default_factory=list)
    took_s: float = 0.0
    stopped: bool = False

    def to_dict(self) -> dict[str, Any]:
        from comparator.capacity.crossover import sentences

        own = {"options": asdict(self.options), "environment": asdict(self.environment)}
        points = {"points": [point.to_dict() for point in self.points], "crossover": sentences(self.points)}
        return {**vars(self), **own, **points}


def run(
    engine: Engine,
    model: str,
    variants: Sequence[Variant],
    options: Options,
    cancel: threading.Event | None = None,
    on_progress: OnProgress = ignore,
    on_point: Callable[[Sweep], None] = ignore,
    seconds: float | None = None,
) -> Sweep:
    """Measure every variant at every batch and context. Where all variants fit together they are measured next to each
    other, point by point, so that a change of the machine's load meets all of them; else one variant after the other.

    on_point: called with the growing sweep after each point. seconds: on the device, after which it is stopped. A point that fails has its reason and the sweep goes on;
    Stop ends it with what there is. Raises `UserError` for a wrong request, `Stopped` before the first point.
    """
    options.check()
    if not variants:
        raise UserError("No variant is selected.", "Select at least one.")
    cancel = cancel or threading.Event()
    variants = list(dict.fromkeys(variants))
    with (
        engine.queue.turn(
            cancel, lambda ahead, _: on_progress(None, f"{ahead} ahead"), lambda: "a sweep is being measured"
        ),
        stopped_after(seconds, cancel),
    ):
        facts = engine.open(model, cancel, on_progress)
        sweeper = _Sweeper(engine, model, facts, options, cancel, on_progress)
        total = len(variants) * len(options.batches) * len(options.contexts)
        sweep = Sweep(facts.source, facts.parameters, options, engine.environment(), total)
        began = time.monotonic()
        try:
            for point in sweeper.points(variants):
                sweep.points.append(point)
                sweep.took_s = time.monotonic() - began
                on_point(sweep)
        except Stopped:
            if not sweep.points:
                raise
            sweep.stopped = True
        return sweep


@dataclass
class _Sweeper:
    """One run's state: which variants are resident, and how much of the work is done."""

    engine: Engine
    model: str
    facts: ModelFacts
    options: Options
    cancel: threading.Event
    on_progress: OnProgress
    handles: dict[Variant, str] = field(default_factory=dict)
    errors: dict[Variant, str] = field(default_factory=dict)
    done: float = 0.0  # of `whole`, in `_work`
    whole: float = 0.0
    began: float = field(default_factory=time.monotonic)

    def points(self, variants: list[Variant]) -> Iterator[Point]:
        together = self._load_together(variants)
        places = [
            (context, batch)
            for context in sorted(self.options.contexts)
            for batch in sorted(self.options.batches)
        ]
        if together:
            order = [(v, *place) for place in places for v in variants]
        else:  # what is resident now goes first
            kept = [v for v in variants if self._resident(v)]
            order = [(v, *place) for v in dict.fromkeys([*kept, *variants]) for place in places]
        todo = [(*entry, self._refusal(*entry)) for entry in order]
        works = [0 if refusal else _work(batch, context, self.options) for _, context, batch, refusal in todo]
        self.whole, self.began = sum(works), time.monotonic()
        for number, ((variant, context, batch, refusal), work) in enumerate(zip(todo, works, strict=True), 1):
            if self.cancel.is_set():
                raise Stopped
            if refusal:
                yield Point(variant.notation, batch, context, error=refusal)
                continue
            self._say(variant, batch, context, number, len(todo))
            yield self._point(variant, batch, context)
            self.done += work

    def _refusal(self, variant: Variant, context: int, batch: int) -> str | None:
        """Why this point will not be measured, as far as it is known before."""
        most = self.facts.context_length
        if most and context + self.options.new_tokens > most:
            return f"{context:,} + {self.options.new_tokens:,} tokens are more than the model's context of {most:,}."
        return self.errors.get(variant)

    def _point(self, variant: Variant, batch: int, context: int) -> Point:
        try:
            handle = self._load(variant)
            return self.engine.score(MeasurePoint(handle, batch, context, self.options), self.cancel)
        except UserError as problem:
            return Point(variant.notation, batch, context, error=problem.problem)

    def _load_together(self, variants: list[Variant]) -> bool:
        """Load variants while those before stay. Returns whether all of them are resident."""
        for variant in variants:
            try:
                self._load(variant)
            except UserError as problem:
                self.errors[variant] = problem.problem
            if not all(self._resident(v) for v in self.handles):
                return False
        return True

    def _load(self, variant: Variant) -> str:
        """The variant's handle, made resident."""
        if self._resident(variant):
            return self.handles[variant]

        def progress(fraction: float | None, message: str) -> None:
            self.on_progress(None, f"{variant.notation}: {message}")

        exact = self.engine.complete(self.model, Cell(variant), self.cancel, progress).variant
        keep = frozenset(self.handles.values())
        loaded = self.engine.load(LoadRequest(self.model, exact, keep=keep), self.cancel, progress)
        self.handles[variant] = loaded.handle
        return loaded.handle

    def _resident(self, variant: Variant) -> bool:
        return variant in self.handles and self.engine.resident(self.handles[variant])

    def _say(self, variant: Variant, batch: int, context: int, number: int, total: int) -> None:
        left = ""
        if self.done:
            seconds = (time.monotonic() - self.began) * (self.whole / self.done - 1)
            left = f", about {formatting.duration(formatting.rounded_duration(seconds))} left"
        what = f"{variant.notation}, batch {batch}, context {context:,}"
        self.on_progress(self.done / self.whole, f"{what} ({number} of {total}{left})")


def _work(batch: int, context: int, options: Options) -> float:
    """What a point costs, roughly: tokens of the prompts, and steps that cost as 16 tokens do and one for each sequence."""
    return batch * context + options.repeats * options.new_tokens * (16 + batch)
