"""Columns that have run → their fidelity: each against the reference, one after another.

Part of a comparison, after the last round, so that it disturbs no latency. What is computed is in `fidelity.tasks`. A
column that cannot be scored keeps everything else, and says why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparator.backends import source_kind
from comparator.core.errors import Stopped, UserError
from comparator.core.events import Event, Scoring
from comparator.core.messages import LoadRequest
from comparator.core.request import Request
from comparator.core.result import AdapterDrift, Fidelity, LayerRow, PromptFidelity
from comparator.core.settings import parse_max_memory
from comparator.core.variant import Adapter, Variant
from comparator.fidelity import eval_text, verdict
from comparator.fidelity.adapter_drift import TOKENS, MeasureDrift
from comparator.fidelity.logits_store import scores_folder
from comparator.fidelity.tasks import (
    ColumnRef,
    CompareTokens,
    KeepAnswer,
    KeepText,
    OtherTokenizer,
    ScoreAnswer,
    ScoreText,
    WeightErrors,
)
from comparator.runtimes import runtime_for
from comparator.util import formatting

if TYPE_CHECKING:
    from comparator.core.messages import Prompt
    from comparator.engine.column import Column
    from comparator.engine.protocol import Engine, Task
    from comparator.fidelity.logits_store import StoredLogits


@dataclass(frozen=True)
class VariantRef:
    """One of the two that are compared: a variant with an adapter, or with none. `name` is for messages."""

    variant: Variant
    adapter: Adapter | None
    name: str


@dataclass
class Reference:
    """What the columns with one adapter are measured against: the reference variant with that adapter."""

    ref: VariantRef
    column: Column | None  # None: that combination is not among the columns
    token_ids: tuple[int, ...] = ()
    logits: StoredLogits | None = None  # of its answer
    text_logits: StoredLogits | None = None  # of the longer text; only where the two do not fit together
    refused: str | None = None


class FidelityScorer:
    """`with FidelityScorer(…) as scorer: scorer.score(column)` for each column of `scorer.order()`.

    Args:
        columns: all of the comparison's; `reference` is one of them.
        text_ids: token ids of the evaluation text.
        emit: gets a `Scoring` event for whatever is being done.
    """

    def __init__(
        self,
        request: Request,
        engine: Engine,
        cancel: threading.Event,
        columns: list[Column],
        reference: Column,
        prompt: Prompt,
        text_ids: tuple[int, ...],
        emit: Callable[[Event], None],
    ):
        self.request, self.engine, self.cancel, self.emit = request, engine, cancel, emit
        self.columns, self.reference, self.prompt = columns, reference, prompt
        self._text_ids = text_ids
        self._references: dict[Adapter | None, Reference] = {}
        self._handles: dict[VariantRef, str] = {}
        # Logits of one variant over the answer of another, for the drift of adapters.
        self._effects: dict[tuple[VariantRef, VariantRef], StoredLogits] = {}
        self._folder: Path | None = None

    def __enter__(self) -> FidelityScorer:
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

    def score(self, column: Column) -> None:
        """Fill in `column.result.fidelity` and the layers' errors. What goes wrong is written there, not raised."""
        try:
            self._measure(column)
            if wrong := verdict.fault(column.result):
                self._note(
                    column,
                    f"The model is likely broken: {wrong} over the whole answer. None of its figures is a result.",
                )
        except Stopped:
            self._refuse(column, "Stopped before it was measured.")
        except UserError as problem:
            self._refuse(column, str(problem))
            self._note(column, f"Fidelity was not measured: {problem}")

    def _refuse(self, column: Column, reason: str) -> None:
        before = column.result.fidelity or Fidelity()
        column.result = replace(column.result, fidelity=replace(before, refused=reason))

    def _measure(self, column: Column) -> None:
        """One figure after another, each written to the result at once, so that a later failure does not cost it."""
        reference = self._reference_for(column)
        if reference.refused:
            raise UserError(reference.refused)
        self._report(column, 0.0, "scoring the answer")
        self._check_tokenizer(column)
        fidelity = self._write(column, Fidelity(self._on_the_answer(column, reference)))
        self._note(
            column,
            *scoring_notes(fidelity.prompt, None if _has_logits(reference.ref) else reference.ref.name),
        )
        self._weights(column, reference)
        fidelity = self._write(column, replace(fidelity, adapter=self._adapter_drift(column, reference)))
        if self.request.fidelity == "text":
            without = next((r.name for r in (ref_of(column), reference.ref) if not _has_logits(r)), None)
            if without:
                self._note(
                    column, f"Divergence and perplexity on the text are –: {without} gives no full logits."
                )
            else:
                self._write(column, replace(fidelity, text=self._on_the_text(column, reference)))

    def _note(self, column: Column, *notes: str) -> None:
        column.result = replace(column.result, notes=(*column.result.notes, *notes))

    def _write(self, column: Column, fidelity: Fidelity) -> Fidelity:
        column.result = replace(column.result, fidelity=fidelity)
        return fidelity

    def _report(self, column: Column, fraction: float | None, message: str) -> None:
        self.emit(Scoring(column.cell, fraction, message))

    def _reference_for(self, column: Column) -> Reference:
        """The reference with this column's adapter, made at the first need."""
        adapter = column.exact.adapter
        if adapter not in self._references:
            owner = next(
                (c for c in self.columns if self._is_reference(c) and c.exact.adapter == adapter), None
            )
            name = self.reference.result.variant + (f" + {adapter.notation}" if adapter else "")
            reference = Reference(VariantRef(self.reference.exact.variant, adapter, name), owner)
            if owner is not None and owner.alive and owner.runs:
                reference.token_ids = owner.result.token_ids
            elif owner is not None or not self.reference.alive:
                failed = owner or self.reference
                why = failed.result.error.problem if failed.result.error else "it was stopped."
                reference.refused = (
                    f"The reference, {failed.result.label}, could not be scored: {why} Choose another reference, or fix "
                    "this first."
                )
            self._references[adapter] = reference
        return self._references[adapter]

    # ------------------------------------------------------------ on the reference's answer

    def _on_the_answer(self, column: Column, reference: Reference) -> PromptFidelity:
        if not _has_logits(reference.ref):
            return self._run(
                column, CompareTokens(self.request.model, reference.token_ids, column.result.token_ids)
            )
        if reference.logits is None:
            self._store_reference_logits(column, reference)
        mine = ref_of(column)
        self._load(mine, column)
        task = ScoreAnswer(
            self._column_ref(mine),
            reference.ref.name,
            self.prompt,
            reference.token_ids,
            reference.logits,
            itself=reference.column is column,
        )
        return self._run(column, task)

    def _store_reference_logits(self, column: Column, reference: Reference) -> None:
        """The reference's own logits of its answer, on disk until the comparison is over."""
        try:
            self._load(reference.ref, column)
            if (
                reference.column is None
            ):  # the reference variant with this adapter is no column: generate its answer
                self._report(column, None, f"{reference.ref.name} answers")
                reference.token_ids = self._generate(reference.ref)
            path = str(self._scores_folder() / f"answer-{len(self._references)}")
            task = KeepAnswer(
                self._column_ref(reference.ref), self.prompt.token_ids, reference.token_ids, path
            )
            reference.logits = self._run(column, task)
        except UserError as problem:
            reference.refused = f"The reference could not be scored: {problem}"
            raise UserError(reference.refused) from None

    def _generate(self, ref: VariantRef) -> tuple[int, ...]:
        run = self.engine.generate(
            self._handles[ref], self.prompt, self.request.settings, self.cancel, adapter=ref.adapter
        )
        if self.cancel.is_set():
            raise Stopped
        return run.token_ids

    def _adapter_drift(self, column: Column, reference: Reference) -> AdapterDrift | None:
        """How far the adapter's effect here is from its effect on the reference base; None where there is none, or
        where a base would have to be loaded for this alone."""
        mine, adapter = ref_of(column), column.exact.adapter
        if adapter is None or mine.variant == reference.ref.variant or reference.logits is None:
            return None
        plain = {r: VariantRef(r.variant, None, r.variant.notation) for r in (mine, reference.ref)}
        if adapter.merged and not all(
            any((c.exact.variant, c.exact.adapter) == (p.variant, None) for c in self.columns)
            for p in plain.values()
        ):
            return None
        tokens = reference.token_ids[:TOKENS]
        logits = {reference.ref: reference.logits}
        for ref in (plain[reference.ref], mine, plain[mine]):
            if (ref, reference.ref) not in self._effects:
                self._load(ref, column)
                path = str(self._scores_folder() / f"effect-{len(self._effects)}")
                task = KeepAnswer(self._column_ref(ref), self.prompt.token_ids, tokens, path)
                self._effects[ref, reference.ref] = self._run(column, task)
            logits[ref] = self._effects[ref, reference.ref]
        pairs = (reference.ref, plain[reference.ref], mine, plain[mine])
        return self._run(column, MeasureDrift(*(logits[ref] for ref in pairs)))

    # ------------------------------------------------------------ on a longer text

    def _on_the_text(self, column: Column, reference: Reference) -> dict[str, Any]:
        text, mine = self.request.evaluation, ref_of(column)
        if reference.column is column:
            self._load(mine, column)
            against: ColumnRef | StoredLogits = self._column_ref(mine)
        elif reference.text_logits is None and self._load_both(mine, reference.ref, column):
            against = self._column_ref(reference.ref)
        else:
            against = self._from_disk(column, reference)
            self._load(mine, column)
        task = ScoreText(
            self._column_ref(mine), against, reference.ref.name, self._text_ids, text.context, text.stride
        )
        return {"name": text.name, **self._run(column, task)}

    def _load_both(self, mine: VariantRef, other: VariantRef, shown: Column) -> bool:
        """Make the reference and the column resident; whether both are now, in one place."""
        self._load(other, shown, keep=mine)
        self._load(mine, shown, keep=other)
        return self.engine.together(self._handles[mine], self._handles[other])

    def _from_disk(self, column: Column, reference: Reference) -> StoredLogits:
        if reference.text_logits is None:
            self._load(reference.ref, column)
            text = self.request.evaluation
            path = str(self._scores_folder() / f"text-{len(self._references)}")
            task = KeepText(self._column_ref(reference.ref), self._text_ids, text.context, text.stride, path)
            reference.text_logits = self._run(column, task)
        apart = self.engine.resident(self._handles.get(reference.ref), self._handles.get(ref_of(column)))
        why = "are kept apart" if apart else "do not fit on the device together"
        note = (
            f"{reference.ref.name} and this variant {why}: the reference's scores of the text were written to disk "
            f"({reference.text_logits.bytes / 1e6:,.0f} MB) and read from there for the comparison."
        )
        column.result = replace(column.result, notes=(*column.result.notes, note))
        return reference.text_logits

    # ------------------------------------------------------------ weights

    def _weights(self, column: Column, reference: Reference) -> None:
        """The error of every weight, where both are resident: loading one again for it would cost too much."""
        mine, other = (self._handles.get(ref) for ref in (ref_of(column), reference.ref))
        if mine == other or not self.engine.compares_weights(mine, other):
            return
        errors = self._run(column, WeightErrors(mine, other))
        column.result = replace(column.result, layers=with_errors(column.result.layers, errors))

    # ------------------------------------------------------------ the rest

    def _check_tokenizer(self, column: Column) -> None:
        """Only a variant with a source of its own can have another tokenizer. Raises `UserError` if it has."""
        for one in (self.reference, column):
            if one.exact.variant.source is None or source_kind(one.exact.variant) != "checkpoint":
                continue
            difference = self._run(column, OtherTokenizer(self.request.model, one.exact.variant))
            if difference:
                raise UserError(
                    f"{one.result.variant} has a different tokenizer from the comparison's model: {difference}. Their "
                    "tokens differ, so no divergence is defined."
                )

    def _load(self, ref: VariantRef, shown: Column, keep: VariantRef | None = None) -> None:
        """Make sure that `ref` is resident; progress is shown in the column `shown`."""
        needed = self._handles.get(keep if keep else ref_of(shown))
        request = LoadRequest(
            self.request.model,
            ref.variant,
            ref.adapter,
            max_memory=parse_max_memory(self.request.max_memory),
            evict=self.request.evict,
            keep=frozenset({needed} if needed else ()),
        )
        loaded = self.engine.load(
            request, self.cancel, lambda _, message: self._report(shown, None, f"{ref.name}: {message}")
        )
        self._handles[ref] = loaded.handle

    def _run(self, column: Column, task: Task) -> Any:
        return self.engine.score(task, self.cancel, lambda *progress: self._report(column, *progress))

    def _column_ref(self, ref: VariantRef) -> ColumnRef:
        return ColumnRef(self._handles[ref], ref.adapter, ref.name)

    def _scores_folder(self) -> Path:
        if self._folder is None:
            self._folder = scores_folder(self.engine.settings.cache_dir)
        return self._folder


def _has_logits(ref: VariantRef) -> bool:
    return "full logits" not in runtime_for(ref.variant).absent


def scoring_notes(prompt: PromptFidelity, without: str | None) -> list[str]:
    """Where a column gives no full logits: what its figures on the answer are, and why some are missing. `without`: the
    name of a reference that gives none."""
    if prompt.top_k is None:
        return []
    if without:
        return [
            f"KL divergence is –: {without}, the reference, gives no full logits. The two answers were compared up to their "
            f"first difference: {formatting.plural(len(prompt.rank), 'token')} of {len(prompt.token_ids)}."
        ]
    notes = [
        f"KL divergence is a lower bound (≥): the variant reports only its {prompt.top_k} most likely tokens at each "
        "position, and all others count as one."
        if prompt.kl
        else "KL divergence is –: the variant returns no log-probabilities."
    ]
    if not prompt.forced:
        notes.append(
            "It cannot be forced to follow the reference's answer, so its own greedy answer was compared up to the first "
            f"difference: {formatting.plural(len(prompt.rank), 'token')} of {len(prompt.token_ids)}."
        )
    return notes


def ref_of(column: Column) -> VariantRef:
    return VariantRef(column.exact.variant, column.exact.adapter, column.result.label)


def check_request(request: Request, context_length: int | None = None) -> None:
    """Raises `UserError` for an evaluation text that is wrong in itself, or too long a context for the model."""
    if request.fidelity == "text":
        eval_text.check(request.evaluation, context_length)


def with_errors(rows: tuple[LayerRow, ...], errors: dict[str, dict]) -> tuple[LayerRow, ...]:
    """The rows with what is known of their errors; undefined values are left out."""
    known = {name: {k: v for k, v in error.items() if v is not None} for name, error in errors.items()}
    return tuple(replace(row, error=known.get(row.name) or row.error) for row in rows)
