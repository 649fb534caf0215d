"""The main comparison over two nodes: the same tokens as in one process, figures from where the work was."""

from __future__ import annotations

import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import ray_actors
import tiny_models

from comparator.adapters import builtin_path
from comparator.backends import resolve
from comparator.comparison.runner import compare
from comparator.core import devices
from comparator.core.errors import UserError
from comparator.core.events import Generated, Generating
from comparator.core.request import GenerationSettings, Request
from comparator.core.settings import Settings
from comparator.core.variant import Cell, parse_adapter
from comparator.engine.local import LocalEngine

PROMPT = "What is the capital of France?"


def request(model: str, *columns: str, **changes) -> Request:
    cells = []
    for column in columns:
        variant, plus, adapter = column.partition(" + ")
        cells.append(Cell(resolve(variant), parse_adapter(adapter) if plus else None))
    settings = changes.pop("settings", GenerationSettings(max_new_tokens=12))
    return Request(model, tuple(cells), changes.pop("prompt", PROMPT), settings=settings, **changes)


def document(request: Request, engine):
    return list(compare(request, engine=engine))[-1].comparison


@pytest.fixture(scope="module")
def model(two_layers) -> str:
    return str(two_layers)


@pytest.fixture(scope="module")
def pirate(tmp_path_factory) -> str:
    """The part of the built-in adapter that fits two layers."""
    return str(
        tiny_models.cut_adapter(builtin_path("pirate"), tmp_path_factory.mktemp("adapters") / "pirate")
    )


@pytest.fixture(scope="module")
def columns(model, pirate):
    return model, "bf16", "nf4", f"bf16 + {pirate}"


@pytest.fixture(scope="module")
def local():
    """An engine in this process, with as many threads as a node lends."""
    import torch

    engine, threads = LocalEngine(Settings()), torch.get_num_threads()
    engine._call(lambda: torch.set_num_threads(1))
    try:
        yield engine
    finally:
        engine._call(lambda: torch.set_num_threads(threads))
        engine.unload()


@pytest.fixture(scope="module")
def here(local, columns):
    return document(request(*columns), local)


@pytest.fixture(scope="module")
def there(shared, columns):
    return document(request(*columns, parallel=True), shared)


def test_the_same_tokens_as_in_one_process(here, there):
    assert there.ok, [c.error for c in there.cells]
    for ours, theirs in zip(here.cells, there.cells, strict=True):
        assert ours.token_ids == theirs.token_ids, f"{ours.label}: the actor computes something else"
        assert ours.text == theirs.text and ours.finish_reason == theirs.finish_reason
        assert ours.kernel == theirs.kernel
        # In one process nf4 is made from the resident bf16, and says so; an actor has nobody to borrow from. Whether a
        # run was disturbed is the machine's affair.
        one, other = (
            [
                n
                for n in notes
                if not n.startswith(("Made from the resident weights", "The run was disturbed"))
            ]
            for notes in (ours.notes, theirs.notes)
        )
        assert one == other
        assert len(theirs.latency.itl_s) == len(theirs.token_ids) - 1, "each token keeps its own time"
        assert ours.memory.weight_bytes == theirs.memory.weight_bytes
        assert [r.name for r in ours.layers] == [r.name for r in theirs.layers]


def test_fidelity_is_the_same_though_no_two_models_share_a_process(here, there):
    for ours, theirs in zip(here.cells, there.cells, strict=True):
        mine, its = ours.fidelity.prompt, theirs.fidelity.prompt
        assert its is not None, f"{theirs.label}: {theirs.fidelity.refused}"
        assert its.kl == pytest.approx(mine.kl, rel=1e-6, abs=1e-9) and its.rank == mine.rank
        drift, far = ours.fidelity.adapter, theirs.fidelity.adapter
        assert (drift is None) == (far is None)
        if drift:
            assert far.kl == pytest.approx(drift.kl, rel=1e-6, abs=1e-9)
    errors = [{row.name: row.error for row in c.layers if row.error} for c in (here.cells[1], there.cells[1])]
    assert len(errors[0]) >= 14 and errors[0].keys() == errors[1].keys()
    for name, error in errors[0].items():
        assert errors[1][name] == pytest.approx(error, rel=1e-6), f"{name} was compared with something else"


def test_columns_say_where_they_ran(there, shared):
    hosts = [c.environment.host for c in there.cells]
    assert set(hosts) == {"alpha", "beta"} and hosts[0] == hosts[2], (
        f"{hosts}: apart where a device is free, and an adapter with its base"
    )
    assert there.environment.host is None or there.environment.host in hosts
    assert not devices.unlike(there.cells), "another host alone makes no device unlike"
    state = shared.state()
    assert {r.variant: r.node for r in state.residents} == {"bf16": hosts[0], "nf4": hosts[1]}
    assert [n.name for n in state.nodes if not n.refused] == ["alpha", "beta"] or len(state.nodes) == 2


def test_columns_of_different_devices_overlap_and_of_one_never(shared, there, columns):
    """The generation of 200 tokens of each: between two of one column come some of the other."""
    wanted = request(
        *columns, prompt="Tell me a story.", fidelity="none", parallel=True,
        settings=GenerationSettings(max_new_tokens=200),
    )  # fmt: skip
    events = [e for e in compare(wanted, engine=shared) if isinstance(e, (Generating, Generated))]
    order = [wanted.cells.index(e.cell) for e in events]
    spans = {i: (order.index(i), len(order) - 1 - order[::-1].index(i)) for i in range(3)}
    assert spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1], f"bf16 and nf4 took turns: {spans}"
    assert spans[0][1] < spans[2][0] or spans[2][1] < spans[0][0], (
        f"two columns of one device ran at once: {spans}"
    )


def test_stop_and_closing_reach_the_actor(shared, there, model):
    cancel = threading.Event()
    wanted = request(
        model, "bf16", prompt="Tell me a story.", settings=GenerationSettings(max_new_tokens=500)
    )
    for event in compare(wanted, engine=shared, cancel=cancel):
        if isinstance(event, Generating):
            cancel.set()
    (cell,) = event.comparison.cells
    assert cell.status == "stopped" and 1 <= len(cell.token_ids) < 400, "the actor went on after Stop"

    events = compare(wanted, engine=shared)
    next(e for e in events if isinstance(e, Generating))
    events.close()
    assert not shared.queue.busy
    assert document(request(model, "bf16", fidelity="none"), shared).ok, (
        "what was closed still holds the device"
    )


def test_a_longer_text_is_compared_from_actor_to_actor(shared, there, local, model):
    from comparator.core.request import EvalSettings

    text = EvalSettings("The quick brown fox jumps over the lazy dog. " * 8, "foxes", 64, 64)
    found = document(request(model, "bf16", "nf4", fidelity="text", evaluation=text), shared)
    ours = document(request(model, "bf16", "nf4", fidelity="text", evaluation=text), local)
    for far, near in zip(found.cells, ours.cells, strict=True):
        assert far.fidelity.text["kl"]["mean"] == pytest.approx(
            near.fidelity.text["kl"]["mean"], rel=0.02, abs=1e-6
        )
    assert any("kept apart" in n for n in found.cells[1].notes)
    from comparator.core.settings import get_settings

    of_actors = {str(pid) for pid in ray_actors.actors()}  # another worker of pytest may be storing its own
    left = [
        f
        for f in (get_settings().cache_dir / "scores").glob("*/*/*")
        if f.parts[-3].partition("-")[0] in of_actors
    ]
    assert not left, f"scores were left on a node's disk: {left}"


def test_sensitivity_brings_the_two_together(shared, there, model):
    from comparator.fidelity.sensitivity import Part, measure

    parts = measure(shared, model, resolve("nf4"), resolve("bf16"), by="kind", tokens=32)
    assert all(isinstance(p, Part) for p in parts) and len(parts) == 7
    assert {r.variant for r in shared.state().residents} == {"bf16", "nf4"}


def test_a_trained_adapter_is_evaluated_as_in_one_process(shared, there, local, model, pirate, tmp_path):
    """Training is refused over a cluster; measuring what was trained elsewhere is not."""
    from comparator.training.artifact import HELDOUT
    from comparator.training.evaluate import evaluate

    folder = tmp_path / "mine"
    shutil.copytree(pirate, folder)
    (folder / "training.json").write_text(json.dumps({"result": {}}))
    ids = local.encode(model, PROMPT, None, None).token_ids
    (folder / HELDOUT).write_text(json.dumps({"row": 1, "ids": ids, "labels": ids}) + "\n")
    result = SimpleNamespace(name="mine", model=model, base="nf4")
    far, near = (evaluate(e, folder, result, ["bf16"], threading.Event()) for e in (shared, local))
    assert [r.adapter for r in far.rows] == [None, "mine"] and not any(r.problem for r in far.rows), far.rows
    for ours, theirs in zip(near.rows, far.rows, strict=True):
        assert (
            theirs.loss == pytest.approx(ours.loss, rel=1e-6) and theirs.tokens == ours.tokens == len(ids) - 1
        )


def test_unloading_ends_the_actor(shared, there, model):
    before = len(ray_actors.actors())
    handle = shared.handle_of(model, "nf4")
    assert shared.unload(handle) > 50e6, "the bytes that came back are the actor's own"
    assert ray_actors.wait_until(lambda: len(ray_actors.actors()) == before - 1), "the actor is still there"
    assert [r.variant for r in shared.state().residents] == ["bf16"]
    with pytest.raises(UserError, match="no longer loaded"):
        shared.layers(handle)


def test_parallel_without_a_cluster_is_refused(model):
    with pytest.raises(UserError, match="Ray cluster") as refused:
        compare(request(model, "bf16", parallel=True), engine=LocalEngine(Settings()))
    assert "COMPARATOR_RAY_ADDRESS" in refused.value.advice


@pytest.mark.slow
def test_a_server_is_asked_from_a_node_and_says_where_it_computes(shared, model):
    """Fifteen seconds for the actor to start. The address is typed: a name would have to be in the node's environment."""
    from openai_server import OpenAIServer, script
    from transformers import AutoTokenizer

    from comparator.sources import open_checkpoint

    tokenizer = AutoTokenizer.from_pretrained(open_checkpoint(model).path)
    says = script(
        tokenizer("The capital of France is Paris.")["input_ids"], len(tokenizer), tokenizer.eos_token_id
    )
    with OpenAIServer(tokenizer, says, owned_by="vllm") as server:
        made = document(request(model, "bf16", f"endpoint@{server.url}"), shared)
        shared.unload()
    reference, column = made.cells
    assert made.ok, [c.error for c in made.cells]
    assert column.text == "The capital of France is Paris." and column.fidelity.prompt.at_least
    assert column.environment.device.startswith("vLLM at endpoint@") and devices.across(column, reference)
    with pytest.raises(UserError, match="no endpoint “nobody”"):
        shared.complete(model, Cell(resolve("endpoint@nobody")), threading.Event())
