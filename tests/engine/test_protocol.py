"""The engine contract: what there is implements it with the same signatures, and a toy is enough for a comparison."""

from __future__ import annotations

import inspect
import pickle
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import toy_engine
from toy_engine import ToyEngine

from comparator.backends import resolve
from comparator.cluster import ClusterEngine
from comparator.comparison import runner
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.events import Done, Failed, Generating, Loading, Queued
from comparator.core.messages import LoadRequest
from comparator.core.request import GenerationSettings, Request
from comparator.core.settings import Settings
from comparator.core.variant import Cell, parse_adapter
from comparator.engine.local import LocalEngine
from comparator.engine.protocol import Engine

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(Engine.__abstractmethods__)


def request(*variants: str, **changes) -> Request:
    cells = tuple(Cell(resolve(v)) for v in variants)
    return Request("toy-model", cells, "Where is it?", **{"fidelity": "none", **changes})


@pytest.mark.parametrize("kind", [LocalEngine, ClusterEngine, ToyEngine])
@pytest.mark.parametrize("name", METHODS)
def test_every_engine_has_the_signatures_of_the_contract(kind, name):
    ours, contract = (inspect.getattr_static(k, name) for k in (kind, Engine))
    assert name not in kind.__abstractmethods__, f"{kind.__name__} does not implement {name}"
    if isinstance(contract, property):
        return
    assert inspect.signature(ours) == inspect.signature(contract), (
        f"{kind.__name__}.{name} takes other arguments than the contract says: callers would have to know which it is"
    )


def test_an_engine_that_lacks_a_method_cannot_be_made():
    class Half(ToyEngine):
        lane = Engine.lane

    with pytest.raises(TypeError, match="lane"):
        Half(Settings())


def test_a_request_travels_to_another_process():
    asked = LoadRequest(
        "toy-model", resolve("nf4"), parse_adapter("pirate*0.5"), {0: 10**9, "cpu": 10**9}, keep=frozenset({"h"})
    )  # fmt: skip
    assert pickle.loads(pickle.dumps(asked)) == asked
    assert not LoadRequest("toy-model", resolve("nf4")).prefer_own_device


def test_a_toy_runs_through_the_comparison_into_a_document():
    engine, events = ToyEngine(Settings(), failing="int8"), []
    settings = GenerationSettings(max_new_tokens=4, repeats=2)
    wanted = request("bf16", "int8", "nf4", settings=settings)
    made = runner.run(wanted, engine=engine, emit=events.append)
    assert events[-1] == Done(made)
    assert [c.status for c in made.cells] == ["ok", "failed", "ok"]
    assert [e.problem for e in events if isinstance(e, Failed)] == ["int8 does not load."]
    assert all(
        c.text == "It is Paris." and c.token_ids == (0, 1, 2, 3) for c in (made.cells[0], made.cells[2])
    )
    assert made.environment.device == "toy" and made.cells[0].kernel == "toy kernel"
    order = [(e.cell.variant.notation, e.round) for e in events if isinstance(e, Generating)]
    assert list(dict.fromkeys(order)) == [("bf16", 0), ("nf4", 0), ("bf16", 1), ("nf4", 1)]
    assert any(isinstance(e, Loading) and e.message == "loading the toy" for e in events)
    assert document.loads(document.dumps(made)) == made
    assert not engine.queue.busy


def test_fidelity_that_an_engine_cannot_measure_costs_nothing_else():
    made = runner.run(
        request("bf16", "nf4", fidelity="prompt"), engine=ToyEngine(Settings()), emit=lambda event: None
    )
    assert made.ok
    assert all("A toy has no logits" in c.fidelity.refused for c in made.cells)


def test_columns_of_different_lanes_run_at_the_same_time():
    """Each column's first chunk waits until both columns have one: run one after another they would never meet."""
    meeting = threading.Barrier(2)

    class Meeting(ToyEngine):
        def generate(self, handle, prompt, settings, cancel, on_chunk=lambda chunk: None, *, adapter=None):
            meeting.wait(20)
            return super().generate(handle, prompt, settings, cancel, on_chunk, adapter=adapter)

    engine = Meeting(Settings(ray_address="auto"))
    made = list(runner.compare(request("bf16", "nf4", parallel=True), engine=engine))[-1].comparison
    assert made.ok, "the two were not run at the same time"
    assert all(r.prefer_own_device for r in engine.requests.values())


def test_stop_and_closing_the_iterator_leave_the_engine_free():
    engine, cancel = ToyEngine(Settings()), threading.Event()
    events = []
    for event in runner.compare(request("bf16", "nf4"), engine=engine, cancel=cancel):
        events.append(event)
        if isinstance(event, Generating):
            cancel.set()
    (first, second) = events[-1].comparison.cells
    assert (first.status, first.token_ids, second.status) == ("stopped", (0,), "stopped"), (
        "the work ran ahead of whoever reads its events"
    )
    closed = runner.compare(request("bf16"), engine=engine)
    next(e for e in closed if isinstance(e, Generating))
    assert engine.queue.busy
    closed.close()
    assert not engine.queue.busy


def test_stop_while_queued_still_gives_a_document():
    engine, cancel, events = ToyEngine(Settings()), threading.Event(), []

    def emit(event) -> None:
        events.append(event)
        if isinstance(event, Queued):
            cancel.set()

    with engine.queue.turn(threading.Event(), describe=lambda: "another comparison runs"):
        made = runner.run(request("bf16"), engine=engine, emit=emit, cancel=cancel)
    assert events[0] == Queued(1, "another comparison runs")
    assert [c.status for c in made.cells] == ["stopped"] and isinstance(events[-1], Done)


def test_a_wrong_request_is_refused_before_the_engine_is_touched():
    engine = ToyEngine(Settings())
    with pytest.raises(UserError, match="prompt"):
        runner.run(replace(request("bf16"), prompt=" "), engine=engine, emit=lambda event: None)
    assert not engine.requests


def test_the_toy_needs_no_torch():
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from toy_engine import ToyEngine\n"
        "from comparator.backends import resolve\n"
        "from comparator.comparison import runner\n"
        "from comparator.core.request import Request\n"
        "from comparator.core.settings import Settings\n"
        "from comparator.core.variant import Cell\n"
        "cells = (Cell(resolve('bf16')), Cell(resolve('nf4')))\n"
        "made = runner.run(Request('toy', cells, 'Hi', fidelity='none'), engine=ToyEngine(Settings()), emit=print)\n"
        "assert made.ok and not {'torch', 'transformers', 'ray'} & set(sys.modules), 'something above imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_engines_say_whether_they_can_train():
    assert toy_engine.REFUSAL == ToyEngine(Settings()).training_refusal()
    assert LocalEngine(Settings()).training_refusal() is None
    cluster = ClusterEngine(Settings(ray_address="auto"))
    assert "Ray cluster" in cluster.training_refusal() and cluster.has_several_devices
    with pytest.raises(UserError, match="Ray cluster"):
        cluster.work(None, threading.Event(), lambda event: None)
