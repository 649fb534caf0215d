"""The nouns: they pickle, they compare, and what was not measured is None."""

from __future__ import annotations

import pickle
from dataclasses import FrozenInstanceError, fields

import pytest
import sample

from comparator.core import events as core_events
from comparator.core import request as core_request
from comparator.core import state
from comparator.core.errors import UserError
from comparator.core.result import CellResult, Latency, Memory
from comparator.core.variant import Adapter, Cell, Variant


def test_everything_that_crosses_the_engine_pickles():
    comparison = sample.comparison()
    cell = Cell(Variant("nf4", options=(("dq", None),)), Adapter("pirate", scale=0.5))
    events = [
        core_events.Queued(2),
        core_events.Loading(cell, 0.4, "loading"),
        core_events.Generating(cell, core_events.Chunk(" Paris", (7042,), (1.5,)), 1),
        core_events.Answering(cell, 3, 40, 12.5),
        core_events.Scoring(cell, None, "scoring"),
        core_events.Generated(cell, sample.NF4),
        core_events.Finished(cell, sample.NF4),
        core_events.Failed(cell, "It broke.", "Mend it.", sample.FAILED),
        core_events.Done(comparison),
    ]
    assert {type(e) for e in events} == set(core_events.Event.__args__), "an event is missing here"
    request = core_request.Request("smollm2-135m", (cell,), "Hello", reference=cell)
    for thing in (
        *events,
        request,
        state.EngineState("cpu", 1, 1, residents=(state.Resident("h", "m", "nf4", 1, "cpu"),)),
    ):
        assert pickle.loads(pickle.dumps(thing)) == thing


def test_a_problem_survives_a_process_boundary():
    problem = pickle.loads(pickle.dumps(UserError("It broke.", "Mend it.")))
    assert (problem.problem, problem.advice, str(problem)) == ("It broke.", "Mend it.", "It broke. Mend it.")
    assert str(UserError("It broke.")) == "It broke."


def test_nothing_is_measured_until_it_is():
    for measured in (Latency(), Memory()):
        values = [getattr(measured, f.name) for f in fields(measured)]
        assert all(value in (None, (), {}) for value in values), (
            "a default of 0 would be shown as a measurement"
        )


def test_nouns_are_frozen():
    with pytest.raises(FrozenInstanceError):
        sample.NF4.text = "changed"
    assert hash(Cell(Variant("nf4"))) == hash(Cell(Variant("nf4"))), "columns are dictionary keys"


def test_labels_and_look_up():
    assert (
        Cell(Variant("nf4", options=(("dq", None),)), Adapter("pirate", scale=0.5)).label
        == "nf4:dq + pirate*0.5"
    )
    comparison = sample.comparison()
    assert [c.label for c in comparison.cells] == ["bf16", "nf4", "nf4 + pirate*0.5", "int8:threshold=0"]
    assert comparison.cell("nf4", "pirate*0.5") == sample.ADAPTED
    assert comparison.cell("nf4", "parrot") is None


def test_a_comparison_is_ok_only_if_every_column_is():
    assert not sample.comparison().ok
    assert sample.comparison(cells=(sample.REFERENCE, sample.NF4)).ok
    assert not sample.comparison(cells=()).ok
    assert not sample.comparison(cells=(CellResult("bf16", status="stopped"),)).ok
