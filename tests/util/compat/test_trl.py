"""The private parts of trl's trainer are where comparator/util/compat/trl.py expects them."""

from __future__ import annotations

import inspect

import pytest

from comparator.util.compat import trl as compat

pytest.importorskip("trl")


def test_a_checkpoint_and_telemetry_go_through_these_methods():
    from trl import SFTTrainer

    assert list(inspect.signature(SFTTrainer._save_checkpoint).parameters) == ["self", "model", "trial"], (
        "the trainer saves a checkpoint in another way: change quiet_trainer"
    )
    assert "self._send_telemetry()" in inspect.getsource(SFTTrainer.__init__) + inspect.getsource(
        SFTTrainer.__mro__[1].__init__
    ), "trl sends its telemetry in another way: it is not off any more"
    assert callable(SFTTrainer.create_model_card)
    saved = []
    kind = compat.quiet_trainer(lambda save, trainer: saved.append((save, trainer)))
    trainer = kind.__new__(kind)
    trainer._save_checkpoint("model", None)
    assert callable(saved[0][0]) and saved[0][1] is trainer


def test_the_trainer_counts_tokens():
    from trl import SFTTrainer

    assert "self._total_train_tokens = 0" in inspect.getsource(SFTTrainer), (
        "trl counts the tokens under another name: change trained_tokens"
    )


def test_the_fused_head_is_a_forward_on_the_model():
    from types import SimpleNamespace

    import trl.trainer.utils as utils

    assert "model.forward = types.MethodType" in inspect.getsource(utils), (
        "trl fuses the head in another way: a trained model may never be freed; change drop_fused_head"
    )
    model = SimpleNamespace(forward=1, weight=2)
    compat.drop_fused_head(model)
    compat.drop_fused_head(model)
    assert vars(model) == {"weight": 2}
