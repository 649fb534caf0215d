"""What can be asked of the engine about fidelity: plain dataclasses that pickle, each with the work it stands for.

`Engine.score(task, cancel)` runs one on the engine's thread. Knows handles and token ids; nothing of requests,
events or pages. Imports no torch until a task runs.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from comparator.types import Adapter, EvalSettings, Problem, PromptFidelity, Variant

if TYPE_CHECKING:
    from comparator.pool import Slot
    from comparator.scoring import Kept

Told = Callable[[float | None, str], None]
SPARE_BYTES = 64 * 10**6  # what a disk keeps free beyond our scores


class Door(Protocol):
    """What a task may use of the engine."""

    def slot(self, handle: str) -> Slot: ...
    def tokenizer(self, slot: Slot) -> Any: ...
    def tokenizer_of(self, model: str) -> Any: ...
    def wearing(self, slot: Slot, adapter: Adapter | None) -> AbstractContextManager[Any]:
        """Yields the slot's model with the adapter switched on, or with none."""
        ...


class Task(Protocol):
    """One piece of work on the engine's thread. Raises `Problem` or `Stopped`."""

    def run(self, door: Door, cancel: threading.Event, told: Told) -> Any: ...


@dataclass(frozen=True)
class Scored:
    """One loaded column: its variant's handle, and the adapter it wears. `name` is for messages."""

    handle: str
    adapter: Adapter | None = None
    name: str = ""


@dataclass(frozen=True)
class KeepAnswer:
    """The reference's scores of its own answer, to a file. Gives `Kept`."""

    column: Scored
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    path: str

    def run(self, door: Door, cancel: threading.Event, told: Told) -> Kept:
        from comparator import scoring

        slot = door.slot(self.column.handle)
        check_space(self.path, 4 * len(self.token_ids) * scoring.vocabulary(slot.model))
        with door.wearing(slot, self.column.adapter) as model:
            return scoring.keep_answer(
                model, list(self.prompt_ids), list(self.token_ids), Path(self.path), cancel,
                lambda share: told(share, "reference scores its answer"),
            )  # fmt: skip


@dataclass(frozen=True)
class ScoreAnswer:
    """One column's view of the reference's answer. Gives `PromptFidelity`."""

    column: Scored
    reference_name: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    reference: Kept
    itself: bool = False  # the reference's own column: its scores are there

    def run(self, door: Door, cancel: threading.Event, told: Told) -> PromptFidelity:
        from comparator import scoring
        from comparator.metrics.fidelity import NotFinite, ShapesDiffer

        slot = door.slot(self.column.handle)
        tokenizer = door.tokenizer(slot)
        with door.wearing(slot, self.column.adapter) as model:
            try:
                return scoring.score_answer(
                    None if self.itself else model, list(self.prompt_ids), list(self.token_ids), self.reference,
                    lambda token: tokenizer.decode([token], clean_up_tokenization_spaces=False), cancel,
                    lambda share: told(share, "scoring the answer"),
                )  # fmt: skip
            except NotFinite as bad:
                name = self.reference_name if bad.side == "reference" else self.column.name
                raise scoring.explain_not_finite(bad, name, "the answer") from None
            except ShapesDiffer as error:
                raise _other_vocabulary(self.column.name, self.reference_name, error) from None


@dataclass(frozen=True)
class EncodeText:
    """The evaluation text's token ids. Gives a tuple of ints; raises `Problem` for a text that is too short."""

    model: str
    evaluation: EvalSettings

    def run(self, door: Door, cancel: threading.Event, told: Told) -> tuple[int, ...]:
        from comparator import evaluation

        return tuple(evaluation.encode(door.tokenizer_of(self.model), self.evaluation))


@dataclass(frozen=True)
class KeepText:
    """The reference's scores of the whole text, to a file. Gives `Kept`."""

    column: Scored
    token_ids: tuple[int, ...]
    context: int
    stride: int
    path: str

    def run(self, door: Door, cancel: threading.Event, told: Told) -> Kept:
        from comparator import scoring

        slot = door.slot(self.column.handle)
        check_space(self.path, scoring.kept_bytes(slot.model, len(self.token_ids) - 1))
        with door.wearing(slot, self.column.adapter) as model:
            return scoring.keep_text(
                model, list(self.token_ids), self.context, self.stride, Path(self.path), cancel,
                lambda share: told(share, "reference scores the text, to disk"),
            )  # fmt: skip


@dataclass(frozen=True)
class ScoreText:
    """One column against the reference (a loaded column, or its kept scores) on a longer text. Gives a dict."""

    column: Scored
    reference: Scored | Kept
    reference_name: str
    token_ids: tuple[int, ...]
    context: int
    stride: int

    def run(self, door: Door, cancel: threading.Event, told: Told) -> dict[str, Any]:
        from comparator import scoring

        slot, reference = door.slot(self.column.handle), self.reference
        with ExitStack() as stack:
            model = other = stack.enter_context(door.wearing(slot, self.column.adapter))
            if not isinstance(reference, Scored):
                other = reference
            elif reference.handle != self.column.handle:
                other = stack.enter_context(door.wearing(door.slot(reference.handle), reference.adapter))
            return self._score(scoring, model, other, cancel, told)

    def _score(self, scoring: Any, model: Any, reference: Any, cancel: threading.Event, told: Told) -> dict:
        from comparator.metrics.fidelity import NotFinite, ShapesDiffer

        try:
            return scoring.score_text(
                model, list(self.token_ids), self.context, self.stride, reference, cancel,
                lambda share: told(share, f"scoring {len(self.token_ids):,} tokens of text"),
            )  # fmt: skip
        except NotFinite as bad:
            name = self.reference_name if bad.side == "reference" else self.column.name
            raise scoring.explain_not_finite(bad, name, "the text") from None
        except ShapesDiffer as error:
            raise _other_vocabulary(self.column.name, self.reference_name, error) from None


@dataclass(frozen=True)
class OtherTokenizer:
    """Whether a variant with a source of its own cuts text as the model does. Gives None, or how they differ."""

    model: str
    variant: Variant

    def run(self, door: Door, cancel: threading.Event, told: Told) -> str | None:
        from comparator.evaluation import shipped

        variant = self.variant
        name = f"{variant.source}@{variant.revision}" if variant.revision else str(variant.source)
        try:
            theirs = door.tokenizer_of(name)
        except Problem:
            return None  # it comes with none that can be read: the model's is what is used
        ours = door.tokenizer_of(self.model)
        one, other = ours.get_vocab(), theirs.get_vocab()
        if one != other:
            differing = len({*one.items()} ^ {*other.items()})
            return f"{differing:,} entries of the vocabularies differ"
        sample = shipped()[:2000] + "\n\tx = {'é': [1, 2]}  # 日本語 🙂"
        if ours(sample)["input_ids"] != theirs(sample)["input_ids"]:
            return "the same text is cut into other tokens"
        return None


@dataclass(frozen=True)
class WeightErrors:
    """How far every weight of one column is from the reference's. Gives {layer row's name: error}."""

    handle: str
    reference: str

    def run(self, door: Door, cancel: threading.Event, told: Told) -> dict[str, dict[str, float | None]]:
        from comparator import weight_errors

        slot, reference = door.slot(self.handle), door.slot(self.reference)
        known = slot.loaded.extra.setdefault("weight errors", {})
        if self.reference not in known:
            known[self.reference] = weight_errors.all_errors(
                slot.model, slot.backend, reference.model, reference.backend, cancel,
                lambda share: told(share, "comparing the weights"),
            )  # fmt: skip
        return known[self.reference]


def check_space(path: str, needed: int) -> None:
    """Raises `Problem` where the disk has not the room for the scores."""
    free = shutil.disk_usage(Path(path).parent).free
    if free < needed + SPARE_BYTES:
        raise Problem(
            f"The reference's scores take {needed / 1e6:,.0f} MB on disk, and {free / 1e6:,.0f} MB are free there.",
            "Free some space, set COMPARATOR_CACHE_DIR to another disk, or use a shorter text.",
        )


def _other_vocabulary(name: str, reference: str, error: ValueError) -> Problem:
    return Problem(
        f"{name} and {reference} have vocabularies of different size: {error}.",
        "Divergence is defined for one vocabulary only; the other figures stand.",
    )
