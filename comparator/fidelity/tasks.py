"""What can be asked of the engine about fidelity: plain dataclasses that pickle, each with the work it stands for.

`LocalEngine.score(task, cancel)` runs one on the engine's thread. Imports no torch until a task runs.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparator.core.errors import UserError
from comparator.core.messages import Prompt
from comparator.core.request import EvalSettings
from comparator.core.result import PromptFidelity
from comparator.core.variant import Adapter, Variant
from comparator.engine.protocol import OnProgress, Task, TaskContext

if TYPE_CHECKING:
    from comparator.fidelity.logits_store import StoredLogits

SPARE_BYTES = 64 * 10**6  # what a disk keeps free beyond our scores


@dataclass(frozen=True)
class ColumnRef:
    """One loaded column: its variant's handle, and the adapter it wears. `name` is for messages."""

    handle: str
    adapter: Adapter | None = None
    name: str = ""


@dataclass(frozen=True)
class KeepAnswer(Task):
    """The reference's scores of its own answer, to a file. Gives `StoredLogits`."""

    column: ColumnRef
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    path: str

    @property
    def runs_on(self) -> str:
        return self.column.handle

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> StoredLogits:
        from comparator.fidelity import scoring

        with context.column(self.column.handle, self.column.adapter) as column:
            check_space(self.path, 4 * len(self.token_ids) * column.vocabulary)
            return scoring.keep_answer(
                column, list(self.prompt_ids), list(self.token_ids), Path(self.path), cancel,
                lambda share: on_progress(share, "scoring the reference answer"),
            )  # fmt: skip


@dataclass(frozen=True)
class ScoreAnswer(Task):
    """One column's view of the reference's answer. Gives `PromptFidelity`."""

    column: ColumnRef
    reference_name: str
    prompt: Prompt
    token_ids: tuple[int, ...]
    reference: StoredLogits
    itself: bool = False  # the reference's own column: its scores are there

    @property
    def runs_on(self) -> str:
        return self.column.handle

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> PromptFidelity:
        from comparator.fidelity import scoring

        with (
            context.column(self.column.handle, self.column.adapter) as column,
            _named(self.column.name, self.reference_name, "the answer"),
        ):
            tokenizer = context.tokenizer(column)

            def text_of(token: int) -> str:
                return tokenizer.decode([token], clean_up_tokenization_spaces=False)

            def report(share: float) -> None:
                on_progress(share, "scoring the answer")

            if "full logits" in column.runtime.absent:
                return scoring.score_choices(
                    column, self.prompt, list(self.token_ids), self.reference, text_of, cancel, report
                )
            return scoring.score_answer(
                None if self.itself else column, list(self.prompt.token_ids), list(self.token_ids), self.reference,
                text_of, cancel, report,
            )  # fmt: skip


@dataclass(frozen=True)
class CompareTokens(Task):
    """Two answers by their tokens alone, where the reference gives no full logits. Gives `PromptFidelity`."""

    model: str
    reference_ids: tuple[int, ...]
    token_ids: tuple[int, ...]

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> PromptFidelity:
        from comparator.fidelity import scoring

        tokenizer = context.tokenizer_of(self.model)
        return scoring.compare_tokens(
            self.reference_ids,
            self.token_ids,
            lambda token: tokenizer.decode([token], clean_up_tokenization_spaces=False),
        )


@dataclass(frozen=True)
class EncodeText(Task):
    """The evaluation text's token ids. Gives a tuple of ints; raises `UserError` for a text that is too short."""

    model: str
    evaluation: EvalSettings

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> tuple[int, ...]:
        from comparator.fidelity import eval_text

        return tuple(eval_text.encode(context.tokenizer_of(self.model), self.evaluation))


@dataclass(frozen=True)
class KeepText(Task):
    """The reference's scores of the whole text, to a file. Gives `StoredLogits`."""

    column: ColumnRef
    token_ids: tuple[int, ...]
    context: int
    stride: int
    path: str

    @property
    def runs_on(self) -> str:
        return self.column.handle

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> StoredLogits:
        from comparator.fidelity import scoring

        with context.column(self.column.handle, self.column.adapter) as column:
            check_space(self.path, (len(self.token_ids) - 1) * column.vocabulary * column.logit_bytes)
            return scoring.keep_text(
                column, list(self.token_ids), self.context, self.stride, Path(self.path), cancel,
                lambda share: on_progress(share, "scoring the text with the reference, to disk"),
            )  # fmt: skip


@dataclass(frozen=True)
class ScoreText(Task):
    """One column against the reference (a loaded column, or its kept scores) on a longer text. Gives a dict."""

    column: ColumnRef
    reference: ColumnRef | StoredLogits
    reference_name: str
    token_ids: tuple[int, ...]
    context: int
    stride: int

    @property
    def runs_on(self) -> str:
        return self.column.handle

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> dict[str, Any]:
        from comparator.fidelity import scoring

        reference = self.reference
        with ExitStack() as stack:
            column = other = stack.enter_context(context.column(self.column.handle, self.column.adapter))
            if not isinstance(reference, ColumnRef):
                other = reference
            elif reference.handle != self.column.handle:
                other = stack.enter_context(context.column(reference.handle, reference.adapter))
            stack.enter_context(_named(self.column.name, self.reference_name, "the text"))
            return scoring.score_text(
                column, list(self.token_ids), self.context, self.stride, other, cancel,
                lambda share: on_progress(share, f"scoring {len(self.token_ids):,} tokens of text"),
            )  # fmt: skip


@dataclass(frozen=True)
class OtherTokenizer(Task):
    """Whether a variant with a source of its own cuts text as the model does. Gives None, or how they differ."""

    model: str
    variant: Variant

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> str | None:
        from comparator.fidelity.eval_text import shipped

        variant = self.variant
        name = f"{variant.source}@{variant.revision}" if variant.revision else str(variant.source)
        try:
            theirs = context.tokenizer_of(name)
        except UserError:
            return None  # it comes with none that can be read: the model's is what is used
        ours = context.tokenizer_of(self.model)
        one, other = ours.get_vocab(), theirs.get_vocab()
        if one != other:
            differing = len({*one.items()} ^ {*other.items()})
            return f"{differing:,} entries of the vocabularies differ"
        sample = shipped()[:2000] + "\n\tx = {'é': [1, 2]}  # 日本語 🙂"
        if ours(sample)["input_ids"] != theirs(sample)["input_ids"]:
            return "the same text is split into different tokens"
        return None


@dataclass(frozen=True)
class WeightErrors(Task):
    """How far every weight of one column is from the reference's. Gives {layer row's name: error}; none where the runtime
    of one of them gives no access to its weights."""

    handle: str
    reference: str

    def run(
        self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress
    ) -> dict[str, dict[str, float | None]]:
        from comparator.fidelity import weight_error

        slot, reference = context.slot(self.handle), context.slot(self.reference)
        ours, theirs = slot.weights(), reference.weights()
        if ours is None or theirs is None:
            return {}
        if self.reference not in slot.weight_errors:
            slot.weight_errors[self.reference] = weight_error.all_errors(
                ours, theirs, cancel, lambda share: on_progress(share, "comparing the weights")
            )
        return slot.weight_errors[self.reference]


def check_space(path: str, needed: int) -> None:
    """Raises `UserError` where the disk has not the room for the scores."""
    free = shutil.disk_usage(Path(path).parent).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"The reference's scores take {needed / 1e6:,.0f} MB on disk, and {free / 1e6:,.0f} MB are free there.",
            "Free some space, set COMPARATOR_CACHE_DIR to another disk, or use a shorter text.",
        )


@contextmanager
def _named(name: str, reference: str, where: str) -> Iterator[None]:
    """Say which of the two columns has no finite logits, or that their vocabularies differ, as a `UserError`."""
    from comparator.fidelity import scoring
    from comparator.fidelity.divergence import NotFinite, ShapesDiffer

    try:
        yield
    except NotFinite as bad:
        side = reference if bad.side == "reference" else name
        raise scoring.explain_not_finite(bad, side, where) from None
    except ShapesDiffer as error:
        raise UserError(
            f"{name} and {reference} have vocabularies of different size: {error}.",
            "Divergence is defined for one vocabulary only; the other figures are valid.",
        ) from None
