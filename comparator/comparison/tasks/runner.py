"""Tasks of lm-evaluation-harness through columns that have run, document by document, then scored by the harness.

All columns answer one document before the next, so that Stop leaves whole rows; each answer is on the disk before the next
one begins. A column that fails at a document is not asked again: the harness scores no task with gaps.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comparator.comparison.set_runner import journal_of, load_again, working_order
from comparator.comparison.tasks import scoring
from comparator.comparison.tasks.catalog import Document, Tasks, short
from comparator.core.errors import Stopped, UserError
from comparator.core.events import Answering
from comparator.core.prompt_set import SetAnswer, SetResult, TaskRun
from comparator.core.request import Request
from comparator.engine.explain import explain
from comparator.fidelity.harness import Answer, AnswerRequests
from comparator.fidelity.tasks import ColumnRef
from comparator.util import error_log

if TYPE_CHECKING:
    import threading

    from comparator.comparison.journal import Journal
    from comparator.core.events import Event
    from comparator.engine.column import Column
    from comparator.engine.protocol import Engine


def run_tasks(
    request: Request,
    tasks: Tasks,
    engine: Engine,
    cancel: threading.Event,
    columns: Sequence[Column],
    reference: Column,
    emit: Callable[[Event], None],
) -> SetResult:
    """The documents with what each column made of them, and the harness's scores; also after Stop, over whole rows."""
    requests = [
        [d.task, d.number, *(repr(i.args) for i in d.instances), tasks.harness] for d in tasks.documents
    ]
    with journal_of(request, engine, cancel, columns, reference, requests) as journal:
        run = _TaskRun(request, tasks, engine, cancel, columns, reference, emit, journal)
        resumed = len(journal.answers)
        run.answer_all()
        return run.result(resumed)


class _TaskRun:
    """Tasks as they run. Columns and documents are named by their number."""

    def __init__(
        self,
        request: Request,
        tasks: Tasks,
        engine: Engine,
        cancel: threading.Event,
        columns: Sequence[Column],
        reference: Column,
        emit: Callable[[Event], None],
        journal: Journal,
    ):
        self.request, self.tasks, self.engine, self.cancel = request, tasks, engine, cancel
        self.columns, self.emit, self.journal = columns, emit, journal
        self.reference, self.order = working_order(columns, reference)
        self.failed: dict[int, tuple[int, str]] = {}  # by column: the document, and why
        self.whole = 0  # documents that every column has answered

    def answer_all(self) -> None:
        began, worked, total = time.monotonic(), 0, len(self.tasks.documents)
        for number, document in enumerate(self.tasks.documents):
            todo = [
                at for at in self.order if at not in self.failed and (at, number) not in self.journal.answers
            ]
            for at in todo:
                if self.cancel.is_set():
                    return
                left_s = (time.monotonic() - began) / worked * (total - number) if worked >= 2 else None
                self.emit(Answering(self.columns[at].cell, number + 1, total, left_s))
                try:
                    self._answer(at, number, document)
                except Stopped:
                    return
            worked += bool(todo)
            self.whole = number + 1

    def _answer(self, at: int, number: int, document: Document) -> None:
        column = self.columns[at]
        try:
            handle = load_again(self.engine, self.request, column, self.cancel)
            ref = ColumnRef(handle, column.exact.adapter, column.result.label)
            given: list[list[Answer]] = [[] for _ in document.instances]
            for (kind, repeats), places in _by_kind(document).items():
                arguments = tuple(document.instances[n].args for n in places) * repeats
                answers = self.engine.score(AnswerRequests(ref, kind, arguments), self.cancel)
                for at_request, one in zip(places * repeats, answers, strict=True):
                    given[at_request].append(one)
        except Stopped:
            raise
        except Exception as error:
            where = f"document {document.number} of {document.task}"
            problem = explain(error, f"answer {where} with {column.cell.label}")
            error_log.release(error)
            self.failed[at] = number, f"{problem.problem} {problem.advice}".strip()
            return
        self.journal.add(at, number, SetAnswer(json.dumps(given)))

    # ------------------------------------------------------------ scores

    def result(self, resumed: int) -> SetResult:
        asked, tasks = self.request.task, self.tasks
        assert asked is not None
        columns: list[scoring.ColumnScores | None] = [None] * len(self.columns)
        for at in self.order if self.whole else ():
            if at not in self.failed:
                columns[at] = scoring.score(tasks, self._given(at), self.whole)
        run = TaskRun(
            tuple(map(short, asked.names)), tasks.harness, asked.limit, len(tasks.documents),
            {name: int(task.get_config("num_fewshot") or 0) for name, task in tasks.by_name.items()},
        )  # fmt: skip
        if not any(columns):
            if self.failed:
                number, why = next(iter(self.failed.values()))
                raise UserError(f"No variant could answer {tasks.name} at document {number}: {why}")
            return SetResult(tasks.name, answers=((),) * len(columns), task=run)
        binary = {name: scoring.is_binary(columns, name) for name in tasks.by_name}
        longest = scoring.room(len(tasks.documents) * len(columns))
        answers = tuple(
            tuple(
                self._failure(at, number)
                if column is None
                else scoring.answer(column, document, binary[document.task], longest)
                for number, document in enumerate(tasks.documents[: self.whole])
            )
            for at, column in enumerate(columns)
        )
        scores = scoring.scores(tasks, columns, self.reference)
        return SetResult(
            tasks.name, scoring.prompts(tasks, columns), answers, resumed=resumed,
            task=replace(run, scores=scores),
        )  # fmt: skip

    def _given(self, at: int) -> dict[int, list[list[Answer]]]:
        return {
            number: [
                [_answer(one) for one in repeats]
                for repeats in json.loads(self.journal.answers[at, number].text)
            ]
            for number in range(self.whole)
        }

    def _failure(self, at: int, number: int) -> SetAnswer | None:
        where, why = self.failed.get(at, (-1, ""))
        return SetAnswer(error=why) if number == where else None


def _by_kind(document: Document) -> dict[tuple[str, int], list[int]]:
    """The places of a document's requests, by (kind, repeats)."""
    kinds: dict[tuple[str, int], list[int]] = {}
    for place, instance in enumerate(document.instances):
        kinds.setdefault((instance.request_type, instance.repeats or 1), []).append(place)
    return kinds


def _answer(value: Any) -> Answer:
    """As the harness gives it: JSON has no tuples."""
    return tuple(value) if isinstance(value, list) else value
