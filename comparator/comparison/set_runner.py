"""A prompt set through columns that have run: answers, checks, and the distance from the reference, prompt by prompt.

Part of a comparison, after its rounds, so that it disturbs no latency. All columns answer one prompt before the next, so
that Stop leaves whole rows; each answer is on the disk before the next one begins.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from comparator.comparison.journal import Journal, key_of, open_journal
from comparator.comparison.prompts import checks
from comparator.core.errors import Stopped, UserError
from comparator.core.events import Answering
from comparator.core.messages import Generation, LoadRequest, Prompt
from comparator.core.prompt_set import SetAnswer, SetPrompt, SetResult
from comparator.core.request import Request
from comparator.core.result import PromptFidelity
from comparator.core.settings import parse_max_memory
from comparator.engine.explain import explain
from comparator.engine.protocol import SinglePlaceEngine
from comparator.fidelity.batch_tasks import BatchAnswer, BatchScore, DecodeBatch, ScoreBatch
from comparator.fidelity.logits_store import StoredLogits, scores_folder
from comparator.fidelity.tasks import ColumnRef, CompareTokens, KeepAnswer, ScoreAnswer
from comparator.runtimes import runtime_for
from comparator.util import error_log

if TYPE_CHECKING:
    import threading
    from pathlib import Path

    from comparator.core.events import Event
    from comparator.engine.column import Column
    from comparator.engine.protocol import Engine


MOST_PADDED = 16_384  # prompts × tokens of the longest that are decoded at once


def run_set(
    request: Request,
    engine: Engine,
    cancel: threading.Event,
    columns: Sequence[Column],
    reference: Column,
    encoder: Encoder,
    emit: Callable[[Event], None],
) -> SetResult:
    """The set's result, also after Stop."""
    with journal_of(request, engine, cancel, columns, reference) as journal:
        return _SetRun(request, engine, cancel, columns, reference, encoder, emit, journal).run()


@contextlib.contextmanager
def journal_of(
    request: Request,
    engine: Engine,
    cancel: threading.Event,
    columns: Sequence[Column],
    reference: Column,
    requests: Any = None,
) -> Iterator[Journal]:
    """The journal of this run, or of an interrupted one; removed where the run ends by itself."""
    journal = Journal()
    if (
        not engine.settings.public
    ):  # visitors' prompts lie nowhere but in the comparisons that they can delete
        key = key_of(request, columns, reference, engine.environment(), requests)
        journal = open_journal(engine.settings.data_dir / "prompt-sets", key, request.resume)
    try:
        yield journal
    except BaseException:
        journal.close()
        raise
    journal.close(remove=not cancel.is_set())


def load_again(engine: Engine, request: Request, column: Column, cancel: threading.Event) -> str:
    """The handle of a column, which is made resident where it was unloaded meanwhile."""
    assert column.loaded is not None
    if not engine.resident(column.loaded.handle):
        column.loaded = engine.load(
            LoadRequest(
                request.model, column.exact.variant, column.exact.adapter,
                max_memory=parse_max_memory(request.max_memory), evict=request.evict,
            ),
            cancel,
        )  # fmt: skip
    return column.loaded.handle


def working_order(columns: Sequence[Column], reference: Column) -> tuple[int, list[int]]:
    """(the reference's number, the numbers of the columns that can answer, the reference first)."""
    number = next(n for n, c in enumerate(columns) if c is reference)
    alive = [n for n, c in enumerate(columns) if c.alive and c.loaded]
    return number, sorted(alive, key=lambda n: n != number)


class _SetRun:
    """A set as it runs. Columns are named by their number, and so are prompts."""

    def __init__(
        self,
        request: Request,
        engine: Engine,
        cancel: threading.Event,
        columns: Sequence[Column],
        reference: Column,
        encoder: Encoder,
        emit: Callable[[Event], None],
        journal: Journal,
    ):
        assert request.prompts is not None
        self.request, self.engine, self.cancel, self.emit, self.journal = (
            request,
            engine,
            cancel,
            emit,
            journal,
        )
        self.columns, self.prompts, self.encoder = columns, request.prompts.prompts, encoder
        self.encoded = encoder.encoded
        self.reference, self.order = working_order(columns, reference)
        self.answers: dict[tuple[int, int], SetAnswer] = dict(journal.answers)
        self.earlier: dict[int, tuple[str, ...]] = {}  # the reference's own answers to earlier turns
        self.logits: dict[int, StoredLogits] = {}  # the reference's, of the prompt at hand

    def run(self) -> SetResult:
        resumed, began, done = len(self.answers), time.monotonic(), 0
        for chunk in self._chunks():
            number, todo = (
                chunk[0],
                [at for at in self.order if any((at, n) not in self.answers for n in chunk)],
            )
            folder = scores_folder(self.engine.settings.cache_dir) if todo else None
            try:
                for at in todo:
                    if self.cancel.is_set():
                        return self._result(resumed)
                    left_s = (
                        (time.monotonic() - began) / done * (len(self.prompts) - number)
                        if done >= 2
                        else None
                    )
                    self.emit(Answering(self.columns[at].cell, number + 1, len(self.prompts), left_s))
                    for each in self._answer_many(
                        at, [n for n in chunk if (at, n) not in self.answers], folder
                    ):
                        self._answer(at, each, folder)
            except Stopped:
                break
            finally:
                self.logits.clear()
                if folder is not None:
                    self.engine.release_scores(folder)
            done += len(chunk) if todo else 0
        return self._result(resumed)

    def _result(self, resumed: int) -> SetResult:
        assert self.request.prompts is not None
        numbers = range(len(self.prompts))
        answers = tuple(tuple(self.answers.get((at, n)) for n in numbers) for at in range(len(self.columns)))
        return SetResult(self.request.prompts.name, self.prompts, answers, self.request.batch, resumed)

    def _chunks(self) -> Iterator[list[int]]:
        """Prompts that are decoded at once: `batch`, fewer where they are long, and a scripted conversation alone."""
        chunk: list[int] = []
        for number in range(len(self.encoded)):
            if self.prompts[number].own_turns:
                yield from ([chunk] if chunk else [])
                yield [number]
                chunk = []
                continue
            longest = max(len(self.encoded[n].token_ids) for n in [*chunk, number])
            if chunk and (len(chunk) == self.request.batch or longest * (len(chunk) + 1) > MOST_PADDED):
                yield chunk
                chunk = []
            chunk.append(number)
        if chunk:
            yield chunk

    def _answer_many(self, at: int, numbers: list[int], folder: Path | None) -> list[int]:
        """Answer several prompts at once; returns those that are to be answered one by one. Raises `Stopped`."""
        column, reference = self.columns[at], self.columns[self.reference]
        full = "full logits" not in runtime_for(reference.exact.variant).absent
        scored = self.request.fidelity != "none" and at != self.reference
        if len(numbers) < 2 or not isinstance(self.engine, SinglePlaceEngine) or (scored and not full):
            return numbers
        keep = at == self.reference and full and self.request.fidelity != "none" and len(self.order) > 1
        prompts, scores = tuple(self.encoded[n] for n in numbers), None
        paths = tuple(f"{folder}/{n}" for n in numbers) if keep else ()
        try:
            task = DecodeBatch(self._ref(column), prompts, self.request.settings, paths)
            answers = self.engine.score(task, self.cancel)
            if answers is not None and scored:
                scores = self._score_many(column, numbers, folder)
        except Stopped:
            raise
        except Exception as error:
            error_log.release(error)  # one by one it is this or that prompt's own
            return numbers
        if answers is None or (scored and scores is None):
            return numbers
        for place, (number, run) in enumerate(zip(numbers, answers, strict=True)):
            answer = replace(judged(run, self.prompts[number]), near_tie=run.near_tie)
            if run.logits is not None:
                self.logits[number] = run.logits
            if scores:
                answer = replace(answer, **asdict(scores[place]))
            self.answers[at, number] = answer
            self.journal.add(at, number, answer, run.token_ids if at == self.reference else None)
        return []

    def _score_many(
        self, column: Column, numbers: list[int], folder: Path | None
    ) -> tuple[BatchScore, ...] | None:
        if any(n not in self.journal.tokens for n in numbers):
            return None
        for number in numbers:
            if number not in self.logits:
                self._keep_logits(number, folder)
        task = ScoreBatch(
            self._ref(column), tuple(self.encoded[n] for n in numbers), tuple(self.journal.tokens[n] for n in numbers),
            tuple(self.logits[n] for n in numbers), self.request.settings,
        )  # fmt: skip
        return self.engine.score(task, self.cancel)

    def _answer(self, at: int, number: int, folder: Path | None) -> None:
        """A failure is this answer's alone, and is tried again when the set is resumed. Raises `Stopped`: an answer that
        was cut short is not kept."""
        column, prompt = self.columns[at], self.prompts[number]
        try:
            run, earlier = self._converse(column, number)
            if at == self.reference:
                self.journal.tokens[number], self.earlier[number] = run.token_ids, earlier
            answer = replace(judged(run, prompt), earlier=earlier)
            if self.request.fidelity != "none":
                answer = with_fidelity(answer, self._fidelity(at, number, run.token_ids, folder))
        except Stopped:
            raise
        except Exception as error:
            problem = explain(error, f"answer prompt {prompt.id} with {column.cell.label}")
            self.answers[at, number] = SetAnswer(error=f"{problem.problem} {problem.advice}".strip())
            return
        self.answers[at, number] = answer
        self.journal.add(at, number, answer, run.token_ids if at == self.reference else None)

    def _converse(self, column: Column, number: int) -> tuple[Generation, tuple[str, ...]]:
        """(the answer to the last turn, the column's own answers before it)."""
        prompt, earlier = self.prompts[number], ()
        handle = load_again(self.engine, self.request, column, self.cancel)
        while True:
            ids = self.encoder.encode(prompt, earlier) if earlier else self.encoded[number]
            run = self.engine.generate(
                handle, ids, self.request.settings, self.cancel, adapter=column.exact.adapter
            )
            if self.cancel.is_set():
                raise Stopped
            if len(earlier) == prompt.own_turns:
                return run, earlier
            earlier = (*earlier, run.text[run.thinking.characters :].strip() if run.thinking else run.text)

    def _prompt_of_reference(self, number: int) -> Prompt:
        """What the reference's last answer follows: its own conversation."""
        if not self.prompts[number].own_turns:
            return self.encoded[number]
        earlier = self.earlier.get(number) or self.answers[self.reference, number].earlier
        return self.encoder.encode(self.prompts[number], earlier)

    # ------------------------------------------------------------ distance from the reference

    def _fidelity(
        self, at: int, number: int, token_ids: tuple[int, ...], folder: Path | None
    ) -> PromptFidelity | None:
        reference = self.columns[self.reference]
        theirs = self.journal.tokens.get(number, ())
        full = "full logits" not in runtime_for(reference.exact.variant).absent
        if at == self.reference:
            if full and len(self.order) > 1:
                self._keep_logits(number, folder)
            return None
        if not theirs:
            return None
        if not full:
            return self.engine.score(CompareTokens(self.request.model, theirs, token_ids), self.cancel)
        if number not in self.logits:  # the reference answered in a run that was interrupted
            self._keep_logits(number, folder)
        own, name = self._ref(self.columns[at]), reference.result.label
        task = ScoreAnswer(own, name, self._prompt_of_reference(number), theirs, self.logits[number])
        return self.engine.score(task, self.cancel)

    def _keep_logits(self, number: int, folder: Path | None) -> None:
        ids, answer = self._prompt_of_reference(number).token_ids, self.journal.tokens[number]
        task = KeepAnswer(self._ref(self.columns[self.reference]), ids, answer, f"{folder}/{number}")
        self.logits[number] = self.engine.score(task, self.cancel)

    def _ref(self, column: Column) -> ColumnRef:
        return ColumnRef(
            load_again(self.engine, self.request, column, self.cancel),
            column.exact.adapter,
            column.result.label,
        )


def judged(run: Generation | BatchAnswer, prompt: SetPrompt) -> SetAnswer:
    """The answer with what its check says of it, without the thinking."""
    passed, why = checks.judge(run.text[run.thinking.characters :] if run.thinking else run.text, prompt)
    return SetAnswer(run.text, len(run.token_ids), run.finish_reason, passed, why)


def with_fidelity(answer: SetAnswer, measured: PromptFidelity | None) -> SetAnswer:
    if measured is None:
        return answer
    return replace(
        answer,
        kl=fmean(measured.kl) if measured.kl else None,
        at_least=measured.at_least,
        agreement=fmean(r == 0 for r in measured.rank) if measured.rank else None,
        first_difference=measured.first_difference,
        compared=max(len(measured.kl), len(measured.rank)),
    )


class Encoder:
    """The set's prompts as token ids. `encoded`: each up to the first turn that a column answers, in the set's order.

    Raises `UserError` naming the prompt that does not fit, at once and in `encode`.
    """

    def __init__(self, request: Request, engine: Engine, check_length: Callable[[int], None]):
        self.request, self.engine, self.check_length = request, engine, check_length
        self.encoded = [self.encode(p) for p in (request.prompts.prompts if request.prompts else ())]

    def encode(self, prompt: SetPrompt, answers: Sequence[str] = ()) -> Prompt:
        """`answers`: a column's own to the turns before."""
        *earlier, last = prompt.conversation(answers)
        request, history = self.request, tuple((m.role, m.content) for m in earlier)
        try:
            ids = self.engine.encode(
                request.model, last.content, prompt.system, request.chat, request.template, history
            )
            self.check_length(len(ids.token_ids))
        except UserError as problem:
            raise UserError(f"Prompt {prompt.id}: {problem.problem}", problem.advice) from None
        return ids
