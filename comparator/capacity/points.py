"""One point of a sweep: a variant at one batch and context, measured.

The prompts are random token ids of one length, the same for every variant, and no token ends a sequence, so that every
variant does the same work. One pass reads all prompts of a batch, then each step decodes one token of each. A server
schedules its requests itself: it gets as many at once, each followed by another one.
"""

from __future__ import annotations

import math
import statistics
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from comparator.core.errors import UserError
from comparator.engine.protocol import OnProgress, Task, TaskContext
from comparator.util import formatting
from comparator.util.stats import percentile

if TYPE_CHECKING:
    from comparator.runtimes.base import RequestTimes, ResidentModel, ServerLoad

LARGEST_BATCH = 1024
PREFILLS_S = 3.0  # prefills are repeated while they take no longer than this together
IN_TURN = 2  # requests that a server gets one after another, in each of the places at once
WARM_UP = 3  # tokens that are decoded before anything is timed


@dataclass(frozen=True)
class Options:
    """What is swept.

    Attributes:
        batches: sequences decoded at once; for a server, concurrent requests.
        new_tokens: of each sequence and run. repeats: runs of each point; fewer than three carry no crossover.
        ttft_limit_s, itl_limit_s: what a request has to meet to count for the goodput; None: no limit.
    """

    batches: tuple[int, ...] = (1, 4, 16)
    contexts: tuple[int, ...] = (512,)
    new_tokens: int = 32
    repeats: int = 3
    seed: int = 0
    ttft_limit_s: float | None = None
    itl_limit_s: float | None = None

    def check(self) -> None:
        """Raises `UserError`."""
        if not self.batches or not self.contexts:
            raise UserError(
                "A sweep needs at least one batch size and one context.", "For example 1,4,16 and 512,2k."
            )
        if max(self.batches) > LARGEST_BATCH:
            raise UserError(
                f"A batch of {max(self.batches):,} is too large.", f"Batches go up to {LARGEST_BATCH:,}."
            )
        if self.new_tokens < 3 or self.repeats < 1:
            raise UserError("At least 3 new tokens and 1 repeat are needed to measure a rate.")

    @property
    def limits(self) -> str:
        """ "TTFT ≤ 500 ms and ITL ≤ 50 ms"; "" without limits."""
        limits = (("TTFT", self.ttft_limit_s), ("ITL", self.itl_limit_s))
        return " and ".join(
            f"{name} ≤ {formatting.seconds(most)}" for name, most in limits if most is not None
        )

    def tokens(self, variants: int, servers: int = 0) -> tuple[int, int]:
        """At most how many tokens are read and how many are decoded, of all points of `variants` and `servers` together."""
        sequences = (variants + IN_TURN * servers) * sum(self.batches)
        read = sequences * sum(self.contexts) * self.repeats
        return read, sequences * len(self.contexts) * (self.repeats * self.new_tokens + WARM_UP)


@dataclass(frozen=True)
class Point:
    """One variant at one batch and context (tokens of each prompt).

    Attributes:
        served: by a server, whose `batch` is how many requests it has at once.
        runs: decode tok/s of all sequences together, one per repeat; of a server over the whole run, prompts included.
        tok_s_each: decode tok/s of one sequence.
        ttft_s: from all prompts to every sequence's first token, the median of the prefills; of a server the median of
            its requests.
        itl_p50_s, itl_p99_s: of all steps of all repeats; a step gives each sequence one token.
        good_share: of requests (sequences), those that meet the limits, by their TTFT and their mean inter-token latency.
        good_per_s: so many of them per second.
        peak_bytes: what the variant holds plus how far the measurement rose above it, a captured step included.
        error: why there are no figures.
    """

    variant: str
    batch: int
    context: int
    served: bool = False
    path: str | None = None
    ttft_s: float | None = None
    runs: tuple[float, ...] = ()
    tok_s_each: float | None = None
    itl_p50_s: float | None = None
    itl_p99_s: float | None = None
    good_share: float | None = None
    good_per_s: float | None = None
    peak_bytes: int | None = None
    joules_per_token: float | None = None
    note: str = ""
    error: str | None = None

    @property
    def tok_s(self) -> float | None:
        """Decode tokens per second of all sequences together, the median of the repeats."""
        return statistics.median(self.runs) if self.runs else None

    def to_dict(self) -> dict[str, Any]:
        figures = asdict(self)
        return {**figures, "decode_tok_s": self.tok_s, "decode_tok_s_per_sequence": figures.pop("tok_s_each")}


@dataclass(frozen=True)
class MeasurePoint(Task):
    """A `Point`'s figures, on the engine's thread."""

    handle: str
    batch: int
    context: int
    options: Options

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> Point:
        with context.column(self.handle) as column:
            if (serve := column.server_load(cancel)) is not None:
                with serve:
                    return self._served(column, serve)
            return self._decoded(column, cancel)

    def _decoded(self, column: ResidentModel, cancel: threading.Event) -> Point:
        """A batch, decoded by this process."""
        from comparator.metrics import energy, memory

        options = self.options
        _check_memory(column, self.batch, self.context, options.new_tokens)
        memory.give_back()
        before = memory.used(column.device)
        prompts = _prompts(column.vocabulary, self.context, options.seed, range(self.batch))
        batch = column.timed_batch(prompts, options.new_tokens, cancel)
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
        ttft_s, took_s = statistics.median(prefills), [times[-1] - times[0] for times in ran]
        steps = options.new_tokens - 1
        runs = tuple(self.batch * steps / s for s in took_s)
        requests = [(ttft_s, s / steps) for s in took_s for _ in range(self.batch)]
        share, per_s = _goodput(options, requests, sum(took_s) + len(ran) * ttft_s)
        return Point(
            column.variant.notation,
            self.batch,
            self.context,
            path=batch.path,
            ttft_s=ttft_s,
            runs=runs,
            tok_s_each=statistics.median(runs) / self.batch,
            itl_p50_s=percentile(gaps, 50),
            itl_p99_s=percentile(gaps, 99),
            good_share=share,
            good_per_s=per_s,
            peak_bytes=(column.memory.resident_bytes or 0) + above,
            joules_per_token=statistics.median(joules) if joules else None,
            note=batch.note,
        )

    def _served(self, column: ResidentModel, load: ServerLoad) -> Point:
        """Requests to a server, `batch` at a time. Raises `UserError` where none was answered."""
        options, count = self.options, self.batch * IN_TURN
        load.open(self.batch)
        load.run(_prompts(column.vocabulary, self.context, options.seed, range(-self.batch, 0)), WARM_UP)
        repeats = []
        for repeat in range(options.repeats):
            rows = range(repeat * count, (repeat + 1) * count)
            prompts = _prompts(column.vocabulary, self.context, options.seed, rows)
            repeats.append(load.run(prompts, options.new_tokens))
        requests = [request for repeat in repeats for request in repeat]
        answered = [request for request in requests if request.error is None]
        if not answered:
            raise UserError(requests[0].error)
        took_s = [_span_s(repeat) for repeat in repeats]
        gaps = [gap for request in answered for gap in request.gaps_s]
        means = [request.mean_gap_s for request in answered]
        share, per_s = _goodput(
            options,
            [(r.ttft_s, mean) for r, mean in zip(answered, means, strict=True)],
            sum(took_s),
            failed=len(requests) - len(answered),
        )
        return Point(
            column.variant.notation,
            self.batch,
            self.context,
            served=True,
            path="server",
            ttft_s=statistics.median(request.ttft_s for request in answered),
            runs=tuple(
                sum(r.tokens for r in repeat) / s for repeat, s in zip(repeats, took_s, strict=True) if s
            ),
            tok_s_each=1 / statistics.median(means) if min(means) > 0 else None,
            itl_p50_s=percentile(gaps, 50),
            itl_p99_s=percentile(gaps, 99),
            good_share=share,
            good_per_s=per_s,
            note=" ".join(_server_notes(requests, self)),
        )


def _prompts(vocabulary: int, length: int, seed: int, rows: range) -> list[list[int]]:
    """Random token ids (rows, length); a row depends on its number alone, so that variants and batches share rows."""
    import numpy as np

    generators = (np.random.default_rng((seed, row % 2**32)) for row in rows)
    return [generator.integers(3, vocabulary, length).tolist() for generator in generators]


def _goodput(
    options: Options, requests: list[tuple[float, float]], took_s: float, failed: int = 0
) -> tuple[float | None, float | None]:
    """(share of requests that meet the limits, so many per second). requests: (TTFT, mean inter-token latency) of each."""
    if not options.limits:
        return None, None
    most = (options.ttft_limit_s or math.inf, options.itl_limit_s or math.inf)
    good = sum(ttft_s <= most[0] and gap_s <= most[1] for ttft_s, gap_s in requests)
    return good / (len(requests) + failed), good / took_s if took_s > 0 else None


def _span_s(requests: Sequence[RequestTimes]) -> float:
    """From the first request to the last token."""
    return max((r.times_s or (r.start_s,))[-1] for r in requests) - min(r.start_s for r in requests)


def _server_notes(requests: Sequence[RequestTimes], point: MeasurePoint) -> Iterator[str]:
    answered = [r for r in requests if r.error is None]
    if len(answered) < len(requests):
        failed = [r for r in requests if r.error is not None]
        yield f"{len(failed)} of {len(requests)} requests failed: {failed[0].error}"
    if short := sum(r.tokens < point.options.new_tokens for r in answered):
        yield f"{short} of {len(answered)} answers ended early: the server does not take ignore_eos."
    counted = [r.prompt_tokens for r in answered if r.prompt_tokens is not None]
    if counted and abs(statistics.median(counted) - point.context) > 0.02 * point.context:
        yield f"The server counted {statistics.median(counted):,.0f} tokens in a prompt of {point.context:,}."
    pieces = sum(len(r.times_s) for r in answered)
    if sum(r.tokens for r in answered) > 1.2 * pieces:
        yield (
            "The server sent several tokens at a time: inter-token latencies are the times between its messages, divided "
            "by their tokens."
        )


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
    with suppress(
        OSError, KeyError, ValueError
    ):  # a config that says too little is no reason to refuse the run
        cache = kv_cache.geometry(column.checkpoint, "fp32" if column.logit_bytes == 4 else "bf16")
        needed += batch * cache.bytes(context + new_tokens)
        needed += activation_bytes(dimensions(column.checkpoint), batch * context, batch, column.logit_bytes)
    free = device_total_and_free(column.device)[1]
    if needed > free:
        raise UserError(
            f"Not enough memory: caches and activations need about {math.ceil(needed / 1e6):,} MB, {free // 10**6:,} MB are free.",
            "Sweep smaller batches or contexts.",
        )
