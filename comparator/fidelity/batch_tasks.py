"""Prompts of a set, several at once on one column: their answers, and the distance from the reference's.

The reference's logits are kept as it decodes; a column scores them with the same steps of several rows.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from comparator.core.messages import Prompt
from comparator.core.request import GenerationSettings
from comparator.core.result import Thinking
from comparator.engine.protocol import OnProgress, Task, TaskContext
from comparator.fidelity.logits_store import StoredLogits
from comparator.fidelity.tasks import ColumnRef, check_space


@dataclass(frozen=True)
class BatchAnswer:
    """`near_tie`: the first token that a single sequence may choose otherwise. `logits`: where they were kept."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str | None
    thinking: Thinking | None
    near_tie: int | None
    logits: StoredLogits | None = None


@dataclass(frozen=True)
class BatchScore:
    """One column's view of the reference's answer: mean KL in nats, share of tokens that it puts first too."""

    kl: float
    agreement: float
    first_difference: int | None
    compared: int


@dataclass(frozen=True)
class DecodeBatch(Task):
    """Answers of one column. `paths`: where to keep the logits of each, or empty. Gives a tuple of `BatchAnswer`; None where
    the column decodes one sequence at a time only."""

    column: ColumnRef
    prompts: tuple[Prompt, ...]
    settings: GenerationSettings
    paths: tuple[str, ...] = ()

    @property
    def runs_on(self) -> str:
        return self.column.handle

    def run(
        self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress
    ) -> tuple[BatchAnswer, ...] | None:
        from comparator.decoding.text import TextStream, thinking
        from comparator.fidelity.logits_store import LogitsWriter

        with ExitStack() as stack:
            column = stack.enter_context(context.column(self.column.handle, self.column.adapter))
            for path in self.paths[:1]:
                check_space(path, 4 * len(self.paths) * self.settings.max_new_tokens * column.vocabulary)
            writers = [stack.enter_context(LogitsWriter(path)) for path in self.paths]

            def keep(row: int, logits: Any) -> None:
                if writers:
                    writers[row].add(logits.unsqueeze(0))

            rows = column.answer_many([p.token_ids for p in self.prompts], self.settings, cancel, keep)
            if rows is None:
                return None
            answers = []
            for number, (row, prompt) in enumerate(zip(rows, self.prompts, strict=True)):
                text = TextStream(context.tokenizer(column))
                text.ids = list(row.token_ids)
                whole, ids = text.finish()[1], tuple(row.token_ids)
                thought = thinking(text.tokenizer, ids, whole, prompt.opened)
                kept = writers[number].kept() if writers else None
                answers.append(BatchAnswer(ids, whole, row.finish_reason, thought, row.near_tie, kept))
            return tuple(answers)


@dataclass(frozen=True)
class ScoreBatch(Task):
    """One column's view of several answers of the reference. Gives a tuple of `BatchScore`, or None as `DecodeBatch`."""

    column: ColumnRef
    prompts: tuple[Prompt, ...]
    answers: tuple[tuple[int, ...], ...]
    references: tuple[StoredLogits, ...]
    settings: GenerationSettings

    @property
    def runs_on(self) -> str:
        return self.column.handle

    def run(
        self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress
    ) -> tuple[BatchScore, ...] | None:
        import torch

        from comparator.fidelity import divergence

        compared: list[list[divergence.Positions]] = [[] for _ in self.prompts]
        first: list[list[bool]] = [[] for _ in self.prompts]

        def compare(row: int, logits: Any) -> None:
            step, ours = len(compared[row]), logits.to("cpu").unsqueeze(0)
            token = self.answers[row][step]
            theirs = self.references[row].rows(step, step + 1)
            compared[row].append(divergence.compare(theirs, ours, torch.tensor([token])))
            first[row].append(int(ours.argmax()) == token)

        ids = [p.token_ids for p in self.prompts]
        with context.column(self.column.handle, self.column.adapter) as column:
            if column.answer_many(ids, self.settings, cancel, compare, self.answers) is None:
                return None
        scores = []
        for positions, same in zip(compared, first, strict=True):
            whole = divergence.joined(positions)
            difference = divergence.first_difference(whole.agree)
            scores.append(BatchScore(float(whole.kl.mean()), fmean(same), difference, len(same)))
        return tuple(scores)
