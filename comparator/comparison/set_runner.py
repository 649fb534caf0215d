"""A prompt set through columns that have run: answers, checks, and the distance from the reference, prompt by prompt.

Part of a comparison, after its rounds, so that it disturbs no latency. All columns answer one prompt before the next, so
that Stop leaves whole rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING

from comparator.comparison.prompts import checks
from comparator.core.errors import Stopped, UserError
from comparator.core.events import Scoring
from comparator.core.messages import LoadRequest, Prompt
from comparator.core.prompt_set import SetAnswer, SetPrompt, SetResult
from comparator.core.request import Request
from comparator.core.result import PromptFidelity
from comparator.core.settings import parse_max_memory
from comparator.engine.explain import explain
from comparator.fidelity.logits_store import scores_folder
from comparator.fidelity.tasks import ColumnRef, CompareTokens, KeepAnswer, ScoreAnswer
from comparator.runtimes import runtime_for
from comparator.util import formatting

if TYPE_CHECKING:
    import threading

    from comparator.core.events import Event
    from comparator.engine.column import Column
    from comparator.engine.protocol import Engine


def run_set(
    request: Request,
    engine: Engine,
    cancel: threading.Event,
    columns: list[Column],
    reference: Column,
    encoded: list[Prompt],
    emit: Callable[[Event], None],
) -> SetResult:
    """The set's result, also after Stop. `encoded`: the prompts' token ids, in the set's order."""
    assert request.prompts is not None
    prompts = request.prompts.prompts
    answers: list[list[SetAnswer | None]] = [[None] * len(prompts) for _ in columns]
    alive = [n for n, c in enumerate(columns) if c.alive and c.loaded]
    order = sorted(alive, key=lambda n: columns[n] is not reference)
    began, folder = time.monotonic(), scores_folder(engine.settings.cache_dir)
    try:
        for number, (prompt, ids) in enumerate(zip(prompts, encoded, strict=True)):
            row = _Row(request, engine, cancel, reference, prompt, ids, str(folder / f"set-{number}"))
            for at in order:
                if cancel.is_set():
                    return _result(request, answers)
                left = _left(number, len(prompts), time.monotonic() - began)
                emit(
                    Scoring(
                        columns[at].cell,
                        number / len(prompts),
                        f"prompt {number + 1} of {len(prompts)}{left}",
                    )
                )
                answers[at][number] = row.answer(columns[at])
            engine.release_scores(folder)
            folder = scores_folder(engine.settings.cache_dir)
    except Stopped:
        pass
    finally:
        engine.release_scores(folder)
    return _result(request, answers)


def _result(request: Request, answers: list[list[SetAnswer | None]]) -> SetResult:
    assert request.prompts is not None
    return SetResult(request.prompts.name, request.prompts.prompts, tuple(map(tuple, answers)))


def _left(done: int, total: int, took_s: float) -> str:
    """ ", about 2 min left", once a few prompts are done."""
    return f", about {formatting.seconds(took_s / done * (total - done))} left" if done >= 2 else ""


class _Row:
    """One prompt through the columns, the reference first."""

    def __init__(
        self,
        request: Request,
        engine: Engine,
        cancel: threading.Event,
        reference: Column,
        prompt: SetPrompt,
        ids: Prompt,
        path: str,
    ):
        self.request, self.engine, self.cancel, self.reference = request, engine, cancel, reference
        self.prompt, self.ids, self.path = prompt, ids, path
        self.theirs: tuple[int, ...] = ()
        self.logits = None

    def answer(self, column: Column) -> SetAnswer:
        """A failure is this answer's alone. Raises `Stopped`: an answer that was cut short is not kept."""
        try:
            handle = self._load(column)
            run = self.engine.generate(
                handle, self.ids, self.request.settings, self.cancel, adapter=column.exact.adapter
            )
            if self.cancel.is_set():
                raise Stopped
            answer_text = run.text[run.thinking.characters :] if run.thinking else run.text
            passed, why = checks.judge(answer_text, self.prompt)
            answer = SetAnswer(run.text, len(run.token_ids), run.finish_reason, passed, why)
            if self.request.fidelity == "none":
                return answer
            return _with_fidelity(answer, self._fidelity(column, handle, run.token_ids))
        except Stopped:
            raise
        except Exception as error:
            problem = explain(error, f"answer prompt {self.prompt.id} with {column.cell.label}")
            return SetAnswer(error=f"{problem.problem} {problem.advice}".strip())

    def _load(self, column: Column) -> str:
        assert column.loaded is not None
        if not self.engine.resident(column.loaded.handle):
            column.loaded = self.engine.load(
                LoadRequest(
                    self.request.model, column.exact.variant, column.exact.adapter,
                    max_memory=parse_max_memory(self.request.max_memory), evict=self.request.evict,
                ),
                self.cancel,
            )  # fmt: skip
        return column.loaded.handle

    def _fidelity(self, column: Column, handle: str, token_ids: tuple[int, ...]) -> PromptFidelity | None:
        own = ColumnRef(handle, column.exact.adapter, column.result.label)
        full = "full logits" not in runtime_for(self.reference.exact.variant).absent
        if column is self.reference:
            self.theirs = token_ids
            if full:
                task = KeepAnswer(own, self.ids.token_ids, token_ids, self.path)
                self.logits = self.engine.score(task, self.cancel)
            return None
        if not self.theirs:
            return None
        if self.logits is None:
            compared = CompareTokens(self.request.model, self.theirs, token_ids)
            return None if full else self.engine.score(compared, self.cancel)
        name = self.reference.result.label
        return self.engine.score(ScoreAnswer(own, name, self.ids, self.theirs, self.logits), self.cancel)


def _with_fidelity(answer: SetAnswer, measured: PromptFidelity | None) -> SetAnswer:
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


def encode_all(request: Request, engine: Engine, check_length: Callable[[int], None]) -> list[Prompt]:
    """The token ids of every prompt. Raises `UserError` naming the prompt that does not fit."""
    encoded = []
    for prompt in request.prompts.prompts if request.prompts else ():
        try:
            ids = engine.encode(request.model, prompt.text, prompt.system, request.chat, request.template)
            check_length(len(ids.token_ids))
        except UserError as problem:
            raise UserError(f"Prompt {prompt.id}: {problem.problem}", problem.advice) from None
        encoded.append(ids)
    return encoded
