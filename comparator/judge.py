"""Columns that have run → their fidelity: each against the reference, one after another.

Part of a comparison, after the last round, so that it disturbs no latency figure. Knows requests, columns and
events; what is computed is in `scoring_tasks`. A column that cannot be scored keeps everything else, and says why.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparator import evaluation
from comparator.adapters.drift import TOKENS, MeasureDrift
from comparator.scoring_tasks import (
    KeepAnswer,
    KeepText,
    OtherTokenizer,
    ScoreAnswer,
    Scored,
    ScoreText,
    WeightErrors,
)
from comparator.settings import parse_max_memory
from comparator.types import (
    Adapter,
    AdapterDrift,
    Event,
    Fidelity,
    LayerRow,
    Problem,
    PromptFidelity,
    Request,
    Scoring,
    Stopped,
    Variant,
)

if TYPE_CHECKING:
    from comparator.compare import Column
    from comparator.engine import Prompt
    from comparator.scoring import Kept
    from comparator.seam import AnyEngine


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a variant wearing an adapter, or none."""

    variant: Variant
    adapter: Adapter | None
    name: str


@dataclass
class Answer:
    """What the columns with one adapter are measured against: the reference variant wearing it."""

    side: Side
    column: Column | None  # None: that combination is not among the columns
    token_ids: tuple[int, ...] = ()
    scores: Kept | None = None
    text_scores: Kept | None = None  # only where the two do not fit together
    refused: str | None = None


class Judge:
    """`with Judge(…) as judge: yield from judge.score(column)` for each column of `judge.order()`."""

    def __init__(
        self,
        request: Request,
        engine: AnyEngine,
        cancel: threading.Event,
        columns: list[Column],
        reference: Column,
        prompt: Prompt,
        text_ids: tuple[int, ...] = (),
    ):
        self.request, self.engine, self.cancel = request, engine, cancel
        self.columns, self.reference, self.prompt = columns, reference, prompt
        self._text_ids = text_ids
        self._answers: dict[Adapter | None, Answer] = {}
        self._handles: dict[Side, str] = {}
        self._effects: dict[tuple[Side, Side], Kept] = {}  # a side's scores of the answer of another
        self._folder: Path | None = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(self, *_) -> None:
        if self._folder:
            self.engine.release_scores(self._folder)

    def order(self) -> list[Column]:
        """Those that can be scored, each reference before what is measured against it."""
        if self.request.fidelity == "none" or (self.request.fidelity == "prompt" and len(self.columns) < 2):
            return []  # one column alone has nothing to be compared with
        alive = [c for c in self.columns if c.alive and c.loaded and c.runs]
        return sorted(alive, key=lambda c: not self._is_reference(c))

    def _is_reference(self, column: Column) -> bool:
        return column.exact.variant == self.reference.exact.variant

    # ------------------------------------------------------------ one column

    def score(self, column: Column) -> Iterator[Event]:
        """Fill `column.result.fidelity` and the layers' errors. What goes wrong is told there, not raised."""
        try:
            for found in self._parts(column):
                if isinstance(found, Fidelity):
                    column.result = replace(column.result, fidelity=found)
                else:
                    yield found
        except Stopped:
            self._refuse(column, "Stopped before it was measured.")
        except Problem as problem:
            self._refuse(column, str(problem))
            column.result = replace(
                column.result, notes=(*column.result.notes, f"Fidelity was not measured: {problem}")
            )

    def _refuse(self, column: Column, reason: str) -> None:
        before = column.result.fidelity or Fidelity()
        column.result = replace(column.result, fidelity=replace(before, refused=reason))

    def _parts(self, column: Column) -> Iterator[Event | Fidelity]:
        answer = self._answer(column)
        if answer.refused:
            raise Problem(answer.refused)
        yield Scoring(column.cell, 0.0, "scoring the answer")
        yield from self._check_tokenizer(column)
        prompt = yield from self._on_the_answer(column, answer)
        yield Fidelity(prompt)
        yield from self._weights(column, answer)
        drift = yield from self._adapter_drift(column, answer)
        yield Fidelity(prompt, adapter=drift)
        if self.request.fidelity == "text":
            text = yield from self._on_the_text(column, answer)
            yield Fidelity(prompt, text, adapter=drift)

    def _answer(self, column: Column) -> Answer:
        """The reference for this column's adapter, made at the first need."""
        adapter = column.exact.adapter
        if adapter not in self._answers:
            owner = next(
                (c for c in self.columns if self._is_reference(c) and c.exact.adapter == adapter), None
            )
            name = self.reference.result.variant + (f" + {adapter.notation}" if adapter else "")
            answer = Answer(Side(self.reference.exact.variant, adapter, name), owner)
            if owner is not None and owner.alive and owner.runs:
                answer.token_ids = owner.result.token_ids
            elif owner is not None or not self.reference.alive:
                failed = owner or self.reference
                why = failed.result.error.problem if failed.result.error else "it was stopped."
                answer.refused = (
                    f"The reference, {failed.result.label}, gave nothing to compare with: {why} "
                    "Choose another reference, or put that right first."
                )
            self._answers[adapter] = answer
        return self._answers[adapter]

    # ------------------------------------------------------------ on the reference's answer

    def _on_the_answer(self, column: Column, answer: Answer) -> Iterator[Event | PromptFidelity]:
        if answer.scores is None:
            yield from self._reference_answers(column, answer)
        mine = side(column)
        yield from self._load(mine, column)
        task = ScoreAnswer(
            self._scored(mine),
            answer.side.name,
            self.prompt.token_ids,
            answer.token_ids,
            answer.scores,
            itself=answer.column is column,
        )
        return (yield from self._run(column, task))

    def _reference_answers(self, column: Column, answer: Answer) -> Iterator[Event]:
        """The reference's own scores of its answer, kept on disk until the comparison is over."""
        try:
            yield from self._load(answer.side, column)
            if (
                answer.column is None
            ):  # the reference variant under this adapter is no column: let it answer now
                yield Scoring(column.cell, None, f"{answer.side.name} answers")
                answer.token_ids = self._generated(answer.side)
            path = str(self._scores_folder() / f"answer-{len(self._answers)}")
            answer.scores = yield from self._run(
                column, KeepAnswer(self._scored(answer.side), self.prompt.token_ids, answer.token_ids, path)
            )
        except Problem as problem:
            answer.refused = f"The reference could not be scored: {problem}"
            raise Problem(answer.refused) from None

    def _generated(self, wanted: Side) -> tuple[int, ...]:
        *_, run = self.engine.generate(
            self._handles[wanted], self.prompt, self.request.settings, self.cancel, adapter=wanted.adapter
        )
        if self.cancel.is_set():
            raise Stopped
        return run.token_ids

    def _adapter_drift(self, column: Column, answer: Answer) -> Iterator[Event | AdapterDrift | None]:
        """How far the adapter's effect here is from its effect on the reference base; None where there is none, or
        where a base would have to be loaded for this alone."""
        mine, adapter = side(column), column.exact.adapter
        if adapter is None or mine.variant == answer.side.variant or answer.scores is None:
            return None
        plain = {s: Side(s.variant, None, s.variant.notation) for s in (mine, answer.side)}
        if adapter.merged and not all(
            any((c.exact.variant, c.exact.adapter) == (p.variant, None) for c in self.columns)
            for p in plain.values()
        ):
            return None
        tokens = answer.token_ids[:TOKENS]
        kept = {answer.side: answer.scores}
        for one in (plain[answer.side], mine, plain[mine]):
            if (one, answer.side) not in self._effects:
                yield from self._load(one, column)
                path = str(self._scores_folder() / f"effect-{len(self._effects)}")
                task = KeepAnswer(self._scored(one), self.prompt.token_ids, tokens, path)
                self._effects[one, answer.side] = yield from self._run(column, task)
            kept[one] = self._effects[one, answer.side]
        return (
            yield from self._run(
                column,
                MeasureDrift(kept[answer.side], kept[plain[answer.side]], kept[mine], kept[plain[mine]]),
            )
        )

    # ------------------------------------------------------------ on a longer text

    def _on_the_text(self, column: Column, answer: Answer) -> Iterator[Event | dict]:
        given, mine = self.request.evaluation, side(column)
        if answer.column is column:
            yield from self._load(mine, column)
            reference: Scored | Kept = self._scored(mine)
        elif answer.text_scores is None and (yield from self._both(mine, answer.side, column)):
            reference = self._scored(answer.side)
        else:
            reference = yield from self._from_disk(column, answer)
            yield from self._load(mine, column)
        task = ScoreText(
            self._scored(mine), reference, answer.side.name, self._text_ids, given.context, given.stride
        )
        return {"name": given.name, **(yield from self._run(column, task))}

    def _both(self, mine: Side, other: Side, shown: Column) -> Iterator[Event | bool]:
        """Make the reference and the column resident; whether both are now, side by side."""
        yield from self._load(other, shown, keep=mine)
        yield from self._load(mine, shown, keep=other)
        return self.engine.together(self._handles[mine], self._handles[other])

    def _from_disk(self, column: Column, answer: Answer) -> Iterator[Event | Kept]:
        if answer.text_scores is None:
            yield from self._load(answer.side, column)
            given = self.request.evaluation
            path = str(self._scores_folder() / f"text-{len(self._answers)}")
            answer.text_scores = yield from self._run(
                column, KeepText(self._scored(answer.side), self._text_ids, given.context, given.stride, path)
            )
        apart = self.engine.resident(self._handles.get(answer.side), self._handles.get(side(column)))
        why = "are held apart" if apart else "do not fit on the device together"
        note = (
            f"{answer.side.name} and this variant {why}: the reference's scores of the text went to disk "
            f"({answer.text_scores.bytes / 1e6:,.0f} MB) and were compared from there."
        )
        column.result = replace(column.result, notes=(*column.result.notes, note))
        return answer.text_scores

    # ------------------------------------------------------------ weights

    def _weights(self, column: Column, answer: Answer) -> Iterator[Event]:
        """The error of every weight, where both are resident: loading one anew for it would cost too much."""
        mine, other = (self._handles.get(s) for s in (side(column), answer.side))
        if mine == other or not self.engine.compares_weights(mine, other):
            return
        errors = yield from self._run(column, WeightErrors(mine, other))
        column.result = replace(column.result, layers=with_errors(column.result.layers, errors))

    # ------------------------------------------------------------ the rest

    def _check_tokenizer(self, column: Column) -> Iterator[Event]:
        """Only a variant with a source of its own can have another tokenizer. Raises `Problem` if it has."""
        for one in (self.reference, column):
            if one.exact.variant.source is None:
                continue
            task = OtherTokenizer(self.request.model, one.exact.variant)
            how = yield from self._run(column, task)
            if how:
                raise Problem(
                    f"{one.result.variant} comes with another tokenizer than the comparison's model: {how}. Their "
                    "tokens are not the same tokens, so no divergence is defined."
                )

    def _load(self, wanted: Side, shown: Column, keep: Side | None = None) -> Iterator[Event]:
        """Make sure that `wanted` is resident; progress is shown in the column `shown`."""
        from comparator.engine import Loaded

        kept = {self._handles.get(keep)} if keep else {self._handles.get(side(shown))}
        for item in self.engine.load(
            self.request.model,
            wanted.variant,
            self.cancel,
            max_memory=parse_max_memory(self.request.max_memory),
            evict=self.request.evict,
            keep=frozenset(kept - {None}),
            adapter=wanted.adapter,
        ):
            if isinstance(item, Loaded):
                self._handles[wanted] = item.handle
            else:
                yield Scoring(shown.cell, None, f"{wanted.name}: {item.message}")

    def _run(self, column: Column, task: Any) -> Iterator[Event | Any]:
        """Run a task, its progress as events; gives its result."""
        from comparator.engine import Progress

        result: Any = None
        for item in self.engine.score(task, self.cancel):
            if isinstance(item, Progress):
                yield Scoring(column.cell, item.fraction, item.message)
            else:
                result = item
        return result

    def _scored(self, one: Side) -> Scored:
        return Scored(self._handles[one], one.adapter, one.name)

    def _scores_folder(self) -> Path:
        if self._folder is None:
            self._folder = scores_folder(self.engine.settings.cache_dir)
        return self._folder


def side(column: Column) -> Side:
    return Side(column.exact.variant, column.exact.adapter, column.result.label)


def check_request(request: Request, context_length: int | None = None) -> None:
    """Raises `Problem` for an evaluation text that is wrong in itself, or too long a context for the model."""
    if request.fidelity == "text":
        evaluation.check(request.evaluation, context_length)


def scores_folder(cache: Path) -> Path:
    """A new folder for scores, that of this process alone. Raises `Problem` where none can be made."""
    parent = cache / "scores"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(parent)
        return Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-{_machine()}-", dir=parent))
    except OSError as error:
        raise Problem(
            f"The reference's scores cannot be kept under {parent}: {error.strerror or error}.",
            "Set COMPARATOR_CACHE_DIR to a folder that can be written to.",
        ) from None


def remove_leftovers(parent: Path) -> None:
    """Scores of processes that are gone; of this machine, since others may keep theirs in the same folder."""
    import psutil

    for folder in parent.iterdir():
        owner, _, rest = folder.name.partition("-")
        if owner.isdigit() and rest.startswith(f"{_machine()}-") and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)


def _machine() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def with_errors(rows: tuple[LayerRow, ...], errors: dict[str, dict]) -> tuple[LayerRow, ...]:
    """The rows with what is known of their errors; undefined values are left out."""
    known = {name: {k: v for k, v in error.items() if v is not None} for name, error in errors.items()}
    return tuple(replace(row, error=known.get(row.name) or row.error) for row in rows)
