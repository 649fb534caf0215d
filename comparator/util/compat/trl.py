"""Private parts of trl's SFTTrainer; written for trl 1.16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WRITTEN_FOR = "1.16"


def quiet_trainer(checkpoint: Callable[[Callable[[], None], Any], None]) -> type:
    """An SFTTrainer that sends no telemetry and writes no model card.

    Args:
        checkpoint: Called instead of saving a checkpoint, with a function that saves it and the trainer.
    """
    from trl import SFTTrainer

    class Trainer(SFTTrainer):
        def _send_telemetry(self, *_, **__):
            pass

        def create_model_card(self, *_, **__):
            pass

        def _save_checkpoint(self, model, trial):
            checkpoint(lambda: super(Trainer, self)._save_checkpoint(model, trial), self)

    return Trainer


def trained_tokens(trainer: Any) -> int:
    """Tokens that went through the model in training, those before a resumed checkpoint included."""
    return trainer._total_train_tokens


def drop_fused_head(model: Any) -> None:
    """Remove the `forward` that trl sets on a model: it holds the model it belongs to."""
    vars(model).pop("forward", None)
