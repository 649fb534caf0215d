"""A request → events and the comparison document.

Columns run one after another, so that they do not disturb each other; with repeats they alternate
(A B C A B C). One column's failure is that column's alone.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from comparator.backends import most_precise
from comparator.comparison.figures import measured
from comparator.comparison.set_runner import Encoder, run_set
from comparator.comparison.tasks import catalog, scoring
from comparator.comparison.tasks.catalog import Tasks
from comparator.comparison.tasks.runner import run_tasks
from comparator.comparison.validation import checked
from comparator.core.errors import Stopped, UserError
from comparator.core.events import (
    Done,
    Event,
    Failed,
    Finished,
    Generated,
    Generating,
    Loading,
    Queued,
)
from comparator.core.messages import LoadRequest, Prompt
from comparator.core.request import AUTOMATIC_ROUNDS, SHORT_ROUND_S, Request
from comparator.core.result import CellResult, Comparison, Environment, ErrorInfo, Memory, PromptInfo
from comparator.core.settings import parse_max_memory
from comparator.core.state import ModelFacts
from comparator.core.variant import Cell, CellName
from comparator.engine.column import Column
from comparator.engine.explain import explain
from comparator.engine.protocol import Engine, OnProgress
from comparator.fidelity.scorer import FidelityScorer, check_request
from comparator.fidelity.tasks import EncodeText
from comparator.util import error_log, streams


def compare(request: Request, *, engine: Engine, cancel: threading.Event | None = None) -> Iterator[Event]:
    """The events of `run`, as they come; the work starts with the first one asked for.

    Raises `UserError` at once for a request that is wrong in itself, otherwise as `run`, while iterating. Closing the
    iterator stops the work and returns once the engine is free.
    """
    request, cancel = checked(request, engine.settings), cancel or threading.Event()
    return streams.iterate(lambda emit: _Comparing(request, engine, cancel, emit).run(), cancel)


def run(
    request: Request, *, engine: Engine, emit: Callable[[Event], None], cancel: threading.Event | None = None
) -> Comparison:
    """Run a comparison; `emit` gets its events, the last of which is `Done`, also after Stop (`cancel.set()`).

    Columns on different devices emit from threads of their own; all others from the calling thread. A column's own
    trouble is a `Failed` event. Raises `UserError` for a request that is wrong in itself, for a model that cannot be
    opened and for a prompt that does not fit it.
    """
    return _Comparing(checked(request, engine.settings), engine, cancel or threading.Event(), emit).run()


class _Comparing:
    """One comparison as it runs."""

    def __init__(
        self, request: Request, engine: Engine, cancel: threading.Event, emit: Callable[[Event], None]
    ):
        self.request, self.engine, self.cancel, self.emit = request, engine, cancel, emit
        self.columns = [Column(c, c, CellResult(c.variant.notation, _adapter(c))) for c in request.cells]
        self.prompt: Prompt | None = None
        self.facts: ModelFacts | None = None
        self.environment = Environment()
        self.text_ids: tuple[int, ...] = ()
        self.encoder: Encoder | None = None
        self.tasks: Tasks | None = None
        self.set_result: Any = None  # `SetResult`
        self.rounds = request.settings.repeats or 1
        self.at = 0  # the column that is being worked on, from 1

    def describe(self) -> str:
        """What is being done, for those who are queued. They may be strangers: neither prompt nor adapter is named."""
        if not self.at:
            return "a comparison is starting"
        return f"a comparison is running, variant {self.at} of {len(self.columns)}"

    def run(self) -> Comparison:
        with error_log.hidden(self.request.prompt, self.request.system):
            try:
                return self._run()
            except Exception as error:
                problem = explain(error, "finish the comparison")  # while the prompt is hidden from the log
                error_log.release(error)
                raise problem from None

    def _run(self) -> Comparison:
        with (
            contextlib.suppress(Stopped),
            self.engine.queue.turn(self.cancel, lambda *status: self.emit(Queued(*status)), self.describe),
        ):
            self._open()
            self._round()
            self.rounds = self._wanted_rounds()
            for _ in range(1, self.rounds):
                self._round()
            self._score()
            if self.encoder:
                self.set_result = run_set(self.request, self.engine, self.cancel, self.columns, self._reference_column(), self.encoder, self.emit)  # fmt: skip
            if self.tasks:
                self.set_result = run_tasks(self.request, self.tasks, self.engine, self.cancel, self.columns, self._reference_column(), self.emit)  # fmt: skip
        return self._settle()

    def _loading(self, column: Column) -> OnProgress:
        return lambda fraction, message: self.emit(Loading(column.cell, fraction, message))

    # ------------------------------------------------------------ before the columns

    def _open(self) -> None:
        request, engine = self.request, self.engine
        progress = self._loading(self.columns[0])
        self.facts = engine.open(request.model, self.cancel, progress)
        if not engine.state().ready:
            progress(None, "starting torch")
        self.environment = engine.environment()
        if request.task:
            progress(None, "loading the documents of the task")
            self.tasks = catalog.load(request.task)
            if not request.prompt:
                first = scoring.text_of(self.tasks.documents[0])
                request = self.request = replace(request, prompt=first, system=None, chat=False)
        if request.prompts:
            self.encoder = Encoder(request, engine, self._check_length)
            self.prompt = self.encoder.encoded[0]
        else:
            self.prompt = engine.encode(
                request.model, request.prompt, request.system, request.chat, request.template
            )
            self._check_length(len(self.prompt.token_ids))
        if request.fidelity == "text":  # a text that is too short is refused before anything runs
            check_request(request, self.facts.context_length)
            progress(None, "reading the evaluation text")
            self.text_ids = engine.score(EncodeText(request.model, request.evaluation), self.cancel)

    def _check_length(self, count: int) -> None:
        limit, new = self.engine.settings.max_prompt_tokens, self.request.settings.max_new_tokens
        context = self.facts.context_length if self.facts else None
        if count > limit:
            raise UserError(
                f"The prompt has {count:,} tokens; the limit here is {limit:,}.",
                "Shorten it (COMPARATOR_MAX_PROMPT_TOKENS sets the limit).",
            )
        if context and count + new > context:
            raise UserError(
                f"The prompt has {count:,} tokens and {new:,} new ones are requested; the model's context is "
                f"{context:,}.",
                f"Ask for at most {context - count:,} new tokens."
                if count < context
                else "Shorten the prompt.",
            )

    # ------------------------------------------------------------ rounds

    @property
    def _automatic(self) -> bool:
        return not (self.request.settings.repeats or self.engine.settings.repeats)

    def _wanted_rounds(self) -> int:
        """How many runs each column gets; `repeats` 0 leaves it to what the first round took."""
        if not self._automatic:
            return self.request.settings.repeats or self.engine.settings.repeats
        ran = [c for c in self.columns if c.alive and c.loaded]
        seconds = sum(run.latency.total_s or 0.0 for c in ran for run in c.runs)
        stays = self.engine.resident(*(c.loaded.handle for c in ran))  # else a further round loads again
        return AUTOMATIC_ROUNDS if seconds < SHORT_ROUND_S and stays and not self.cancel.is_set() else 1

    def _round(self) -> None:
        """One run of each column. Where the number of runs is left open, a disturbed one is repeated once, unless all
        were: they still compare, and the disturbance is likely to last."""
        self._at_once() if self.request.parallel else self._one_by_one(self.columns)
        ran = [c for c in self.columns if c.alive and c.runs]
        disturbed = [c for c in ran if c.runs[-1].latency.disturbed]
        if self._automatic and disturbed and (len(disturbed) < len(ran) or len(ran) == 1):
            self._one_by_one(disturbed)

    def _one_by_one(self, columns: Sequence[Column]) -> None:
        for column in columns:
            self._attempt(column, lambda column=column: (self._load(column), self._generate(column)))

    def _at_once(self) -> None:
        """First all are loaded, since loading disturbs; then each device runs its own, one after another. Columns that
        were unloaded to free memory for others run afterwards."""
        lanes: dict[str | None, list[Column]] = {}
        for column in self.columns:
            self._attempt(column, lambda column=column: self._load(column))
        for column in self.columns:
            if column.alive and column.loaded:
                lanes.setdefault(self.engine.lane(column.loaded.handle), []).append(column)
        unloaded = lanes.pop(None, ())
        streams.at_once([lambda lane=lane: self._lane(lane) for lane in lanes.values()], self.cancel)
        self._one_by_one(unloaded)

    def _lane(self, columns: Sequence[Column]) -> None:
        for column in columns:
            self._attempt(column, lambda column=column: self._generate(column))

    def _attempt(self, column: Column, step: Callable[[], Any]) -> None:
        """Run a step of a column that has not failed; its failure is its own."""
        if not column.alive or self.cancel.is_set():
            return
        self.at = next(n for n, known in enumerate(self.columns, 1) if known is column)
        try:
            step()
        except Stopped:
            column.result = replace(column.result, status="stopped")
        except Exception as error:
            problem = explain(error, f"run {column.cell.label}")
            error_log.release(error)
            self._fail(column, problem)

    def _load(self, column: Column) -> None:
        request, progress = self.request, self._loading(column)
        progress(0.0, "loading")
        column.exact = self.engine.complete(request.model, column.cell, self.cancel, progress)
        again = column.loaded is not None
        column.loaded = self.engine.load(
            LoadRequest(
                request.model,
                column.exact.variant,
                column.exact.adapter,
                max_memory=parse_max_memory(request.max_memory),
                evict=request.evict,
                keep=frozenset(c.loaded.handle for c in self.columns if c.loaded),
                prefer_own_device=request.parallel,
            ),
            self.cancel,
            progress,
        )
        if not again:  # a reload between rounds is not this column's first load
            column.load_s, column.prepare_s = column.loaded.load_s, column.loaded.prepare_s
            column.adapter_load_s = column.loaded.adapter_load_s
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

    def _generate(self, column: Column) -> None:
        number = len(column.runs)
        rounds = max(self.rounds, number + 1)
        run = self.engine.generate(
            column.loaded.handle,
            self.prompt,
            self.request.settings,
            self.cancel,
            lambda chunk: self.emit(Generating(column.cell, chunk, number, rounds)),
            adapter=column.exact.adapter,
        )
        column.runs.append(run)
        if run.prepare_s is not None:
            column.prepare_s = (column.prepare_s or 0.0) + run.prepare_s
        column.result = measured(column)
        if run.finish_reason == "stopped" and number == 0:
            column.result = replace(column.result, status="stopped")
        self.emit(Generated(column.cell, column.result))

    def _fail(self, column: Column, problem: UserError) -> None:
        cells = self.request.cells
        sources = [part.source for c in cells for part in (c.variant, c.adapter) if part and part.source]

        def saved(
            text: str,
        ) -> str:  # a document is passed around, and this machine's folders are nobody's business
            return error_log.shorten_paths(text, (self.request.model, *sources))

        column.result = replace(
            column.result,
            status="failed",
            error=ErrorInfo(
                saved(problem.problem), saved(problem.advice), error_log.with_request(problem, self.request)
            ),
            memory=Memory() if not column.loaded else column.result.memory,
        )
        column.finished = True
        self.emit(Failed(column.cell, problem.problem, problem.advice, column.result))

    # ------------------------------------------------------------ after the columns

    def _score(self) -> None:
        """Fidelity, once no latency can be disturbed any more."""
        scorer = FidelityScorer(
            self.request, self.engine, self.cancel, self.columns, self._reference_column(), self.prompt, self.text_ids,
            self.emit,
        )  # fmt: skip
        with scorer:
            for column in scorer.order():
                if self.cancel.is_set():
                    return
                scorer.score(column)
                self._finish(column)

    def _finish(self, column: Column) -> None:
        column.finished = True
        self.emit(Finished(column.cell, column.result))

    def _settle(self) -> Comparison:
        """Report every column, one that no round finished as stopped, and make the document."""
        for column in self.columns:
            if column.finished:
                continue
            if column.alive and not column.runs:
                column.result = replace(column.result, status="stopped")
            self._finish(column)
        document = self._document()
        self.emit(Done(document))
        return document

    def _document(self) -> Comparison:
        request, common = self.request, self._common_environment()
        return Comparison(
            id=secrets.token_urlsafe(16),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            model=request.model,
            prompt=PromptInfo(
                text=request.prompt,
                system=request.system or None,
                chat=bool(self.prompt and self.prompt.chat),
                token_count=len(self.prompt.token_ids) if self.prompt else None,
                template=request.template.name,
                template_vars=request.template.variables,
            ),
            settings=replace(request.settings, repeats=self.rounds),
            environment=common or self.environment,
            reference=self._reference(),
            schema=2 if self.set_result else 1,
            prompt_set=self.set_result,
            cells=tuple(replace(c.result, environment=None) if common else c.result for c in self.columns),
        )

    def _common_environment(self) -> Environment | None:
        """Where all columns ran, if that was one place that is not the engine's own."""
        used = [c.result.environment for c in self.columns if c.loaded]
        return used[0] if used and all(e == used[0] for e in used) else None

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


def _adapter(cell: Cell) -> str | None:
    return cell.adapter.notation if cell.adapter else None
