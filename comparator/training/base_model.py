"""The base model of a training run: a separate copy, since peft modifies the model. Runs on the engine's thread."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from comparator.backends import backend_for, transformers_loader
from comparator.backends.base import Backend, Placement
from comparator.core.errors import UserError
from comparator.core.variant import Variant

Progress = Callable[[float | None, str], None]


@dataclass
class Base:
    """A prepared base. `variant`: the completed one; `notes`: how the loaded model differs from it."""

    model: Any
    variant: Variant
    notes: tuple[str, ...]
    quantized: bool


def device() -> str:
    """The training device: one GPU, or the CPU. Call on the engine's thread, or once torch is imported."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def load(checkpoint: Any, variant: Variant, device: str, checkpointing: bool, progress: Progress) -> Base:
    """Load the base and prepare it for training. Raises `UserError`, and what `progress` raises."""
    backend = backend_for(variant)
    if reason := backend.unavailable(variant):
        raise UserError(
            f"{variant.method} cannot be used here: {reason}.", "Install it, or train on another base."
        )
    quantized = backend.training(variant, device).quantized
    exact = backend.complete(variant, checkpoint, progress)
    backend.silence()
    progress(None, f"importing {backend.name}")
    transformers_loader.import_quietly(*backend.requires, "peft", "trl")
    model, notes = _first_that_loads(backend, exact, checkpoint, Placement(device), progress)
    if quantized:
        from peft import prepare_model_for_kbit_training

        progress(None, "preparing the quantized base for training")
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    backend.prepare_for_training(model)
    model.config.use_cache = True
    return Base(model, exact, notes, quantized)


def _first_that_loads(
    backend: Backend, variant: Variant, checkpoint: Any, placement: Placement, progress: Progress
) -> tuple[Any, tuple[str, ...]]:
    """(model, notes) of the first of the backend's training variants that can be used here."""
    choices = backend.training_variants(variant, placement.device)
    for choice, notes in choices:
        try:
            backend.prepare(checkpoint, choice, placement, progress)
            progress(0.0, f"loading {choice.notation}")
            return backend.load(checkpoint, choice, placement, progress).model, notes
        except UserError:
            if choice == choices[-1][0]:
                raise
    raise ValueError(f"{backend.name}.training_variants({variant.notation}) is empty")
