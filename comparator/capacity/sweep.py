"""Sweep: speed, latency and memory of variants over batch sizes and contexts, measured on this machine.

The prompts are random token ids of one length, the same for every variant, and no token ends a sequence, so that every
variant does the same work. One pass reads all prompts of a batch, then each step decodes one token of each.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from comparator.core.errors import Stopped, UserError
from comparator.core.messages import LoadRequest
from comparator.core.result import Environment
from comparator.core.state import ModelFacts
from comparator.core.variant import Cell, Variant
from comparator.engine.protocol import Engine, OnProgress, Task, TaskContext, ignore
from comparator.util import formatting
from comparator.util.stats import percentile
from comparator.util.streams import stopped_after

LARGEST_BATCH = 1024
PREFILLS_S = 3.0  # prefills are repeated while they take no longer than this together
WARM_UP = 3  # tokens that are decoded before anything is timed


@dataclass(frozen=True)
class Options:
    """`new_tokens`: of each sequence and run. `repeats`: decode runs of each point; fewer than three carry no crossover."""

    batches: tuple[int, ...] = (1, 4, 16)
    contexts: tuple[int, ...] = (512,)
    new_tokens: int = 32
    repeats: int = 3
    seed: int = 0

    def check(self) -> None:
        """Raises `UserError`."""
        if not self.batches or not self.contexts:
            raise UserError("A sweep needs a batch and a context.", "Write 1,4,16 and 512,2k, for instance.")
        if max(self.batches) > LARGEST_BATCH:
            raise UserError(
                f"A batch of {max(self.batches):,} is too large.", f"Batches go up to {LARGEST_BATCH:,}."
            )
        if self.new_tokens < 3 or self.repeats < 1:
            raise UserError("At least 3 new tokens and 1 repeat are needed to measure a rate.")

    def tokens(self, variants: int) -> tuple[int, int]:
        """At most how many tokens are read and how many are decoded, of all points together."""
        sequences = variants * sum(self.batches)
        read = sequences * sum(self.contexts) * self.repeats
        return read, sequences * len(self.contexts) * (self.repeats * self.new_tokens + WARM_UP)


@dataclass(frozen=True)
class Point:
    """One variant at one batch and context (tokens of each prompt).

    Attributes:
        runs: decode tok/s of all sequences together, one per repeat.
        ttft_s: from all prompts to every sequence's first token, the median of the prefills.
        itl_p50_s, itl_p99_s: of all steps of all repeats; a step gives each sequence one token.
        peak_bytes: what the variant holds plus how far the measurement rose above it, a captured step included.
        error: why there are no figures.
    """

    variant: str
    batch: int
    context: int
    path: str | None = None
    ttft_s: float | None = None
    runs: tuple[float, ...] = ()
    itl_p50_s: float | None = None
    itl_p99_s: float | None = None
    peak_bytes: int | None = None
    joules_per_token: float | None = None
    note: str = ""
    error: str | None = None

    @property
    def tok_s(self) -> float | None:
        """Decode tokens per second of all sequences together, the median of the repeats."""
        return statistics.median(self.runs) if self.runs else None

    @property
    def tok_s_each(self) -> float | None:
        return self.tok_s / self.batch if self.runs else None

    def to_dict(self) -> dict[str, Any]:
        figures = asdict(self)
        return {**figures, "decode_tok_s": self.tok_s, "decode_tok_s_per_sequence": self.tok_s_each}


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


@dataclass(frozen=True)
class MeasurePoint(Task):
    """A `Point`'s figures, on the engine's thread."""

    handle: str
    batch: int
    context: int
    options: Options

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> Point:
        from comparator.metrics import energy, memory

        options = self.options
        with context.column(self.handle) as column:
            _check_memory(column, self.batch, self.context, options.new_tokens)
            memory.give_back()
            before = memory.used(column.device)
            batch = column.timed_batch(_prompts(column.vocabulary, self), options.new_tokens, cancel)
            joules, ran, prefills = [], [], []
            with memory.track(column.device) as peak:
                while not prefills or (
                    len(prefills) < options.repeats and sum(prefills) + prefills[-1] < PREFILLS_S
                ):
                    prefills.append(batch.prefill())
                batch.decode(WARM_UP)
                for _ in range(options.repeats):
                    with energy.metered(column.device) as used:
                        start, times, _ = batch.decode()
                    ran.append([start, *times])
                    if (each := used.per_token(ran[-1])) is not None:
                        joules.append(each / self.batch)
            gaps = [b - a for times in ran for a, b in zip(times, times[1:], strict=False)]
            above = max(0, peak.start_bytes - before) + (peak.above_bytes or 0)
            return Point(
                column.variant.notation,
                self.batch,
                self.context,
                path=batch.path,
                ttft_s=statistics.median(prefills),
                runs=tuple(self.batch * (len(t) - 1) / (t[-1] - t[0]) for t in ran),
                itl_p50_s=percentile(gaps, 50),
                itl_p99_s=percentile(gaps, 99),
                peak_bytes=(column.memory.resident_bytes or 0) + above,
                joules_per_token=statistics.median(joules) if joules else None,
                note=batch.note,
            )


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


def _prompts(vocabulary: int, point: MeasurePoint) -> list[list[int]]:
    """Random token ids (batch, context); a batch's first rows are those of the smaller batches."""
    import numpy as np

    rows = (np.random.default_rng((point.options.seed, row)) for row in range(point.batch))
    return [generator.integers(3, vocabulary, point.context).tolist() for generator in rows]


def _check_memory(column: Any, batch: int, context: int, new_tokens: int) -> None:
    """Raises `UserError` where a CPU's memory would not hold the caches and a pass: the system would end the process. A GPU
    says so itself."""
    if column.device.startswith("cuda"):
        return
    from comparator.capacity import kv_cache
    from comparator.capacity.estimate import activation_bytes
    from comparator.metrics.memory import RESERVE_BYTES, device_total_and_free
    from comparator.sources.dimensions import dimensions

    needed = RESERVE_BYTES
    with suppress(OSError, KeyError, ValueError):  # a config that says too little is not held against the run
        cache = kv_cache.geometry(column.checkpoint, "fp32" if column.logit_bytes == 4 else "bf16")
        needed += batch * cache.bytes(context + new_tokens)
        needed += activation_bytes(dimensions(column.checkpoint), batch * context, batch, column.logit_bytes)
    free = device_total_and_free(column.device)[1]
    if needed > free:
        raise UserError(
            f"Not enough memory: caches and activations need about {math.ceil(needed / 1e6):,} MB, {free // 10**6:,} MB are free.",
            "Sweep smaller batches or contexts.",
        )
