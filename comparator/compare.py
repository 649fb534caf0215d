"""A request → events: the one place where everything meets. Knows nothing of pages, files or torch.

Columns run one after another, so that they do not disturb each other; with repeats they alternate
(A B C A B C). One column's failure is that column's alone.
"""

from __future__ import annotations

import secrets
import statistics
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from comparator import engine as engines
from comparator import parallel
from comparator.backends import most_precise
from comparator.checks import checked
from comparator.engine import Generation, Loaded, Prompt
from comparator.judge import Judge, check_request
from comparator.metrics import latency
from comparator.scoring_tasks import EncodeText
from comparator.seam import AnyEngine
from comparator.settings import parse_max_memory
from comparator.types import (
    Cell,
    CellName,
    CellResult,
    Chunk,
    Comparison,
    Done,
    Energy,
    Environment,
    ErrorInfo,
    Event,
    Failed,
    Finished,
    Generated,
    Generating,
    Loading,
    Memory,
    ModelFacts,
    Problem,
    PromptInfo,
    Queued,
    Request,
    Stopped,
)


@dataclass
class Column:
    """One cell on its way: what has been measured so far."""

    cell: Cell  # as asked for: what events carry
    exact: Cell  # with what the model filled in
    result: CellResult
    loaded: Loaded | None = None
    runs: list[Generation] = field(default_factory=list)
    load_s: float | None = None
    prepare_s: float | None = None
    adapter_load_s: float | None = None
    finished: bool = False

    @property
    def alive(self) -> bool:
        return self.result.status == "ok"


def compare(
    request: Request, *, engine: AnyEngine | None = None, cancel: threading.Event | None = None
) -> Iterator[Event]:
    """Run a comparison and yield its events; the last one is `Done`, also after Stop (`cancel.set()`).

    Raises `Problem` at once for a request that is wrong in itself, and while iterating for a model that cannot be
    opened or a prompt that does not fit it. A column's own trouble is a `Failed` event. Closing the iterator stops
    the work and frees the engine.
    """
    engine = engine or engines.get_engine()
    request = checked(request, engine.settings)
    return _Comparing(request, engine, cancel or threading.Event()).events()


class _Comparing:
    """One comparison as it runs."""

    def __init__(self, request: Request, engine: AnyEngine, cancel: threading.Event):
        self.request, self.engine, self.cancel = request, engine, cancel
        self.columns = [Column(c, c, CellResult(c.variant.notation, _adapter(c))) for c in request.cells]
        self.prompt: Prompt | None = None
        self.facts: ModelFacts | None = None
        self.environment = Environment()
        self.text_ids: tuple[int, ...] = ()
        self.at = 0  # the column that is being worked on, from 1

    def doing(self) -> str:
        """What is being done, for those who wait. They may be strangers: neither prompt nor adapter is named."""
        if not self.at:
            return "a comparison is beginning"
        return f"a comparison is running, column {self.at} of {len(self.columns)}"

    def events(self) -> Iterator[Event]:
        ticket = self.engine.turns.enter(self.doing)
        try:
            for ahead in self.engine.turns.wait(ticket, self.cancel):
                yield Queued(ahead, self.engine.turns.doing)
            try:
                yield from self._open()
                for number in range(self.request.settings.repeats):
                    yield from self._at_once(number) if self.request.parallel else self._in_turn(number)
                yield from self._score()
            except Stopped:
                pass
            yield from self._settle()
        finally:
            self.engine.turns.leave(ticket)

    # ------------------------------------------------------------ before the columns

    def _open(self) -> Iterator[Event]:
        first = self.columns[0].cell
        for item in self.engine.open(self.request.model, self.cancel):
            if isinstance(item, ModelFacts):
                self.facts = item
            else:
                yield Loading(first, item.fraction, item.message)
        if not self.engine.state().ready:
            yield Loading(first, None, "starting torch")
        self.environment = self.engine.environment()
        self.prompt = self.engine.encode(
            self.request.model, self.request.prompt, self.request.system, self.request.chat
        )
        self._check_length(len(self.prompt.token_ids))
        if self.request.fidelity == "text":  # a text that is too short is told before anything runs
            check_request(self.request, self.facts.context_length if self.facts else None)
            yield Loading(first, None, "reading the evaluation text")
            task = EncodeText(self.request.model, self.request.evaluation)
            (self.text_ids,) = self.engine.score(task, self.cancel)

    def _check_length(self, count: int) -> None:
        limit, new = self.engine.settings.max_prompt_tokens, self.request.settings.max_new_tokens
        context = self.facts.context_length if self.facts else None
        if count > limit:
            raise Problem(
                f"The prompt has {count:,} tokens; the limit here is {limit:,}.",
                "Shorten it (COMPARATOR_MAX_PROMPT_TOKENS sets the limit).",
            )
        if context and count + new > context:
            raise Problem(
                f"The prompt has {count:,} tokens and {new:,} new ones are asked for; the model's context is "
                f"{context:,}.",
                f"Ask for at most {context - count:,} new tokens."
                if count < context
                else "Shorten the prompt.",
            )

    # ------------------------------------------------------------ one column, once

    def _in_turn(self, number: int, columns: Sequence[Column] | None = None) -> Iterator[Event]:
        for column in self.columns if columns is None else columns:
            yield from self._round(column, number)

    def _at_once(self, number: int) -> Iterator[Event]:
        """First all are loaded, since loading disturbs; then each device runs its own, one after another. What had to
        go to make room for others takes its turn afterwards."""
        lanes: dict[str | None, list[Column]] = {}
        for column in self.columns:
            yield from self._step(column, self._load(column))
        for column in self.columns:
            if column.alive and column.loaded:
                lanes.setdefault(self.engine.lane(column.loaded.handle), []).append(column)
        later = lanes.pop(None, ())
        yield from parallel.merged([self._lane(found, number) for found in lanes.values()], self.cancel)
        yield from self._in_turn(number, later)

    def _lane(self, columns: Sequence[Column], number: int) -> Iterator[Event]:
        for column in columns:
            yield from self._step(column, self._generate(column, number))

    def _round(self, column: Column, number: int) -> Iterator[Event]:
        def steps() -> Iterator[Event]:
            yield from self._load(column)
            yield from self._generate(column, number)

        return self._step(column, steps())

    def _step(self, column: Column, events: Iterator[Event]) -> Iterator[Event]:
        """The events of a column that is still alive; its failure is its own."""
        if not column.alive or self.cancel.is_set():
            return
        self.at = next(n for n, known in enumerate(self.columns, 1) if known is column)
        try:
            yield from events
        except Stopped:
            column.result = replace(column.result, status="stopped")
        except Problem as problem:
            yield self._fail(column, problem)

    def _load(self, column: Column) -> Iterator[Event]:
        yield Loading(column.cell, 0.0, "loading")
        for item in self.engine.complete(self.request.model, column.cell, self.cancel):
            if isinstance(item, Cell):
                column.exact = item
            else:
                yield Loading(column.cell, item.fraction, item.message)
        keep = frozenset(c.loaded.handle for c in self.columns if c.loaded)
        steps = self.engine.load(
            self.request.model,
            column.exact.variant,
            self.cancel,
            max_memory=parse_max_memory(self.request.max_memory),
            evict=self.request.evict,
            keep=keep,
            adapter=column.exact.adapter,
            **({"apart": True} if self.request.parallel else {}),
        )
        for item in steps:
            if isinstance(item, Loaded):
                again = column.loaded is not None
                column.loaded = item
                if not again:  # a reload between rounds is not this column's first load
                    column.load_s, column.prepare_s = item.load_s, item.prepare_s
                    column.adapter_load_s = item.adapter_load_s
            else:
                yield Loading(column.cell, item.fraction, item.message)
        loaded = column.loaded
        column.result = replace(
            column.result,
            variant=column.exact.variant.notation,
            model=loaded.model,
            kernel=loaded.kernel,
            notes=loaded.notes,
            memory=loaded.memory,
            latency=replace(column.result.latency, load_s=column.load_s, prepare_s=column.prepare_s),
            layers=self.engine.layers(loaded.handle, column.exact.adapter),
            adapter_info=loaded.adapter,
            environment=loaded.environment,
        )

    def _generate(self, column: Column, number: int) -> Iterator[Event]:
        run: Generation | None = None
        for item in self.engine.generate(
            column.loaded.handle,
            self.prompt,
            self.request.settings,
            self.cancel,
            adapter=column.exact.adapter,
        ):
            if isinstance(item, Chunk):
                yield Generating(column.cell, item, number)
            else:
                run = item
        column.runs.append(run)
        if run.prepare_s is not None:
            column.prepare_s = (column.prepare_s or 0.0) + run.prepare_s
        column.result = self._measured(column)
        if run.finish_reason == "stopped" and number == 0:
            column.result = replace(column.result, status="stopped")
        yield Generated(column.cell, column.result)

    def _measured(self, column: Column) -> CellResult:
        runs, first = column.runs, column.runs[0]
        whole = [r for r in runs if r.finish_reason != "stopped"] or runs[:1]
        figures = latency.median_of([r.latency for r in whole])
        peaks = [r.run_peak_bytes for r in runs if r.run_peak_bytes is not None]
        memory = replace(
            column.result.memory,
            run_peak_bytes=max(peaks) if peaks else None,
            kv_cache_bytes=first.kv_cache_bytes,
        )
        notes = (*column.result.notes, *(n for n in first.notes if n not in column.result.notes))
        if any(r.token_ids != first.token_ids for r in whole):
            notes = (
                *notes,
                "The repeats gave different tokens: this kernel does not repeat its own rounding.",
            )
        return replace(
            column.result,
            text=first.text,
            token_ids=first.token_ids,
            finish_reason=first.finish_reason,
            decode_path=first.decode_path,
            energy=_energy(whole),
            notes=notes,
            latency=replace(
                figures,
                load_s=column.load_s,
                prepare_s=column.prepare_s,
                adapter_load_s=column.adapter_load_s,
                adapter_switch_s=first.adapter_switch_s,
            ),
            memory=memory,
        )

    def _fail(self, column: Column, problem: Problem) -> Event:
        column.result = replace(
            column.result,
            status="failed",
            error=ErrorInfo(problem.problem, problem.advice),
            memory=Memory() if not column.loaded else column.result.memory,
        )
        column.finished = True
        return Failed(column.cell, problem.problem, problem.advice, column.result)

    # ------------------------------------------------------------ after the columns

    def _score(self) -> Iterator[Event]:
        """Fidelity, once no figure of time can be disturbed any more."""
        reference = self._reference_column()
        judge = Judge(
            self.request, self.engine, self.cancel, self.columns, reference, self.prompt, self.text_ids
        )
        with judge:
            for column in judge.order():
                if self.cancel.is_set():
                    return
                yield from judge.score(column)
                column.finished = True
                yield Finished(column.cell, column.result)

    def _settle(self) -> Iterator[Event]:
        """What no round finished was stopped; everything is reported; the document is made."""
        for column in self.columns:
            if column.finished:
                continue
            if column.alive and not column.runs:
                column.result = replace(column.result, status="stopped")
            column.finished = True
            yield Finished(column.cell, column.result)
        yield Done(self._document())

    def _document(self) -> Comparison:
        request = self.request
        return Comparison(
            id=secrets.token_urlsafe(16),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            model=request.model,
            prompt=PromptInfo(
                text=request.prompt,
                system=request.system or None,
                chat=bool(self.prompt and self.prompt.chat),
                token_count=len(self.prompt.token_ids) if self.prompt else None,
            ),
            settings=request.settings,
            environment=self._common() or self.environment,
            reference=self._reference(),
            cells=tuple(
                replace(c.result, environment=None) if self._common() else c.result for c in self.columns
            ),
        )

    def _common(self) -> Environment | None:
        """Where all columns ran, if that was one place that is not the engine's own."""
        found = [c.result.environment for c in self.columns if c.loaded]
        return found[0] if found and all(e == found[0] for e in found) else None

    def _reference(self) -> CellName | None:
        column = self._reference_column()
        return CellName(column.result.variant, column.result.adapter)

    def _reference_column(self) -> Column:
        """The chosen reference, or the most precise column that worked, one without an adapter first."""
        if self.request.reference:
            return next(c for c in self.columns if c.cell == self.request.reference)
        usable = [c for c in self.columns if c.alive] or self.columns
        plain = [c for c in usable if c.cell.adapter is None] or usable
        best = most_precise([c.cell.variant for c in plain])
        return next(c for c in plain if c.cell.variant == best)


def _energy(runs: list[Generation]) -> Energy | None:
    """The median over the runs, None where no meter is."""
    measured = [r.joules_per_token for r in runs if r.joules_per_token is not None]
    return Energy(statistics.median(measured)) if measured else None


def _adapter(cell: Cell) -> str | None:
    return cell.adapter.notation if cell.adapter else None
