"""Which actor runs a task, and what the task then brings along. No Ray: actors are plain handles."""

from __future__ import annotations

from dataclasses import replace

import pytest

from comparator.backends import resolve
from comparator.cluster.actor import Facts
from comparator.cluster.actor_handle import ActorHandle
from comparator.cluster.remote_tensors import RemoteLogits, RemoteWeightErrors, WithSecondModel
from comparator.cluster.routing import routed, stored_at
from comparator.core.errors import UserError
from comparator.core.messages import Prompt
from comparator.core.request import EvalSettings
from comparator.fidelity.adapter_drift import MeasureDrift
from comparator.fidelity.logits_store import StoredLogits
from comparator.fidelity.sensitivity import OnePartAtATime
from comparator.fidelity.tasks import ColumnRef, EncodeText, OtherTokenizer, ScoreAnswer, WeightErrors
from comparator.training.evaluate import ScoreSamples

ONE = ActorHandle(("model", "bf16"), "ray handle 1", Facts("node-1", 1, ()), "alpha", 1)
TWO = ActorHandle(("model", "nf4"), "ray handle 2", Facts("node-2", 2, ()), "beta", 1, limits={0: 10})
BY_HANDLE = {"bf16": ONE, "nf4": TWO}


def route(task):
    return routed(task, BY_HANDLE.__getitem__, (ONE, TWO))


def stored(actor: ActorHandle) -> RemoteLogits:
    return stored_at(StoredLogits("/tmp/x", 1, 2, "float32"), actor)


@pytest.mark.parametrize("task", [EncodeText("m", EvalSettings()), OtherTokenizer("m", resolve("nf4"))])
def test_what_needs_no_variant_runs_where_models_are_read(task):
    assert route(task) == (None, task)


def test_evaluation_of_an_adapter_runs_where_its_variant_is():
    task = ScoreSamples("nf4", None, ())
    assert route(task) == (TWO, task), "evaluating a trained adapter over the cluster goes nowhere"


def test_a_column_is_scored_where_it_is_and_learns_who_has_the_reference():
    task = ScoreAnswer(ColumnRef("nf4"), "bf16", Prompt((1,), False), (2,), stored(ONE))
    actor, sent = route(task)
    assert actor is TWO and sent.reference.actor == "ray handle 1"
    assert replace(sent, reference=replace(sent.reference, actor=None)) == task


def test_logits_of_an_actor_that_is_gone_are_a_problem_in_words():
    lost = replace(stored(ONE), owner="somebody else")
    with pytest.raises(UserError, match="lost with the actor on node alpha"):
        route(ScoreAnswer(ColumnRef("nf4"), "bf16", Prompt((1,), False), (2,), lost))


def test_drift_runs_where_the_variants_logits_lie():
    actor, sent = route(MeasureDrift(stored(ONE), stored(ONE), stored(TWO), stored(TWO)))
    assert actor is TWO and sent.reference.actor == "ray handle 1" and sent.variant.actor == "ray handle 2"


def test_two_models_in_two_places():
    assert route(WeightErrors("nf4", "bf16")) == (
        TWO, RemoteWeightErrors("nf4", "bf16", "ray handle 1", "node alpha"),
    )  # fmt: skip
    task = OnePartAtATime("nf4", "bf16", (1, 2), 8, 8, "kind")
    assert route(task) == (TWO, WithSecondModel(task, "model", resolve("bf16"), {0: 10}))
    assert route(replace(task, reference="nf4")) == (TWO, replace(task, reference="nf4"))


def test_only_logits_get_a_place():
    assert stored_at((1, 2), ONE) == (1, 2)
    assert stored(ONE) == RemoteLogits("/tmp/x", 1, 2, "float32", ONE.id, "node-1", "node alpha")
