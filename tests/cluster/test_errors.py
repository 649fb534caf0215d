"""What is lost stays one column's trouble: actors, nodes and the driver are killed for real, at many moments."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray_actors
import tiny_models

from comparator.backends import resolve
from comparator.cluster import ClusterEngine
from comparator.comparison.runner import compare
from comparator.core.errors import UserError
from comparator.core.events import Generated, Generating, Loading, Scoring
from comparator.core.request import GenerationSettings, Request
from comparator.core.settings import Settings
from comparator.core.variant import Cell

ROOT = Path(__file__).resolve().parents[2]
VARIANTS = ("fp32", "bf16")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.save(folder, "llama", max_position_embeddings=1024)
    return str(folder)


def request(model: str, *variants: str, new: int = 60, **changes) -> Request:
    cells = tuple(Cell(resolve(v)) for v in variants or VARIANTS)
    return Request(
        model, cells, "The quick brown fox", settings=GenerationSettings(max_new_tokens=new), **changes
    )


OTHERS: set[int] = set()  # actors of other tests' engines that were there before


def ours() -> set[int]:
    return set(ray_actors.actors()) - OTHERS


def run(request: Request, engine):
    return list(compare(request, engine=engine))[-1].comparison


# Each names an event of the bf16 column and how long after it the actor is killed, in seconds: as soon as it is there.
MOMENTS = [
    (Loading, "starting an actor", 0.0),
    (Generating, "", 0.0),
]
MANY = [
    (Loading, "Loading weights", 0.0),
    *((Loading, "starting an actor", s) for s in (0.2, 0.5, 0.9, 1.5, 2.0, 2.5, 3.0)),
    *((Loading, "", s) for s in (0.0, 0.05, 0.3)),
    *((Generating, "", s) for s in (0.0, 0.02, 0.05, 0.1, 0.2)),
    *((Generated, "", s) for s in (0.0, 0.05)),
    *((Scoring, "", s) for s in (0.0, 0.02, 0.1)),
]


def killed_at(engine: ClusterEngine, wanted: Request, kind: type, message: str, after_s: float):
    """Run, killing the process that appeared for the second column `after_s` after its event; (document, the event
    was reached)."""
    engine.unload(engine.handle_of(wanted.model, "bf16") or "")
    before, cell, timer = set(ray_actors.actors()), wanted.cells[1], None

    def new() -> set[int]:
        return set(ray_actors.actors()) - before

    def kill() -> None:
        ray_actors.wait_until(new, 60)
        for pid in new():
            os.kill(pid, signal.SIGKILL)

    for event in compare(wanted, engine=engine):
        hit = isinstance(event, kind) and event.cell == cell and message in getattr(event, "message", "")
        if hit and timer is None:
            timer = threading.Timer(after_s, kill)
            timer.start()
            if not after_s and new():
                timer.join()
    timer.join()
    return event.comparison


def check_contained(engine: ClusterEngine, model: str, document, kind: type) -> None:
    first, second = document.cells
    assert first.status == "ok", f"the other column failed too: {first.error}"
    if second.status == "failed":
        assert any(
            w in second.error.problem for w in ("died", "does not answer", "could not start", "lost")
        ), second.error
        assert "fresh actor" in second.error.advice or "log" in second.error.advice.lower()
    elif second.fidelity and second.fidelity.refused:
        assert second.text and "fresh actor" in second.fidelity.refused, "what was measured before stays"


@pytest.fixture(scope="module")
def settled(machines, model):
    """One engine, whose fp32 column is resident."""
    OTHERS.update(ray_actors.actors())
    engine = ClusterEngine(Settings(ray_address=machines.address, max_new_tokens=512))
    try:
        assert run(request(model, "fp32"), engine).ok
        yield engine
    finally:
        engine.close()


@pytest.mark.parametrize(
    "kind, message, after_s", MOMENTS, ids=[f"{k.__name__}-{m[:8]}" for k, m, _ in MOMENTS]
)
def test_an_actor_that_is_killed_fails_its_column_alone(settled, model, kind, message, after_s):
    wanted = request(model, new=120 if kind is Generating else 40)
    document = killed_at(settled, wanted, kind, message, after_s)
    check_contained(settled, model, document, kind)
    second = document.cells[1]
    assert second.status == "failed" or second.fidelity.refused, (
        f"nothing was killed at {kind.__name__} {message}"
    )


def test_the_next_run_gets_a_fresh_actor(settled, model):
    assert run(request(model), settled).ok
    assert len(ours()) == 3, "a clerk and two columns; what was killed or failed must leave none"


@pytest.mark.slow
def test_a_node_that_is_lost_fails_its_column_alone(settled, machines, model):
    third = machines.add("gamma")

    def usable() -> list[str]:
        settled._call("refresh")
        return [n.name for n in settled.state().nodes if not n.refused]

    assert ray_actors.wait_until(lambda: "gamma" in usable(), 60), f"the new node was not found: {usable()}"
    # What is resident stays where it is, on one machine or on two; of two that are placed now one gets the new machine.
    wanted = request(model, "fp32", "fp16", "int8:dtype=fp32", new=500, parallel=True, fidelity="none")
    hosts, gone = {}, None
    for event in compare(wanted, engine=settled):
        if isinstance(event, Generating) and gone is None:
            hosts = {r.variant: r.node for r in settled.state().residents}
            if hosts.get(event.cell.variant.notation) == "gamma":
                gone = event.cell.variant.notation
                machines.lose(third)
    assert gone, (
        f"with free nodes no column went to the new one: {hosts}, {[c.error for c in event.comparison.cells]}"
    )
    status = {c.variant: c.status for c in event.comparison.cells}
    assert status.pop(gone) == "failed", f"{gone} was on the node that went: {hosts}"
    assert set(status.values()) == {"ok"}
    failed = event.comparison.cell(gone)
    assert "gamma" in failed.error.problem and failed.error.advice
    assert ray_actors.wait_until(lambda: "gamma" not in usable(), 90), "a node that is gone is still offered"
    assert run(request(model, gone, fidelity="none"), settled).ok, "the next run has to find another place"


def test_versions_that_differ_are_refused_by_name(settled, machines, model, tmp_path):
    copy = tmp_path / "comparator"
    shutil.copytree(ROOT / "comparator", copy, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "types.py").write_text((copy / "types.py").read_text() + "\n# another checkout\n")
    other = machines.add("delta", env_vars={"PYTHONPATH": str(tmp_path)})
    bare = machines.add("epsilon", env_vars={"PYTHONPATH": str(tmp_path / "nothing")})
    try:
        settled._call("refresh")
        nodes = {n.name: n for n in settled.state().nodes}
        assert "Quant Comparator" in nodes["delta"].refused and "there" in nodes["delta"].refused
        assert "cannot be imported" in (nodes["epsilon"].refused or ""), nodes["epsilon"]
        assert nodes["alpha"].refused is None and nodes["beta"].refused is None
    finally:
        machines.ray.remove_node(other)
        machines.ray.remove_node(bare)


@pytest.mark.slow
def test_a_driver_that_is_killed_is_replaced_and_takes_its_actors_along(settled, model):
    wanted, killed = request(model, "fp32", "bf16", new=400, fidelity="none"), False
    before = ours()
    for event in compare(wanted, engine=settled):
        if isinstance(event, Generating) and not killed:
            settled._connection.process.kill()
            killed = True
    failed = [c for c in event.comparison.cells if c.status == "failed"]
    assert failed and "lost" in failed[0].error.problem and "Run again" in failed[0].error.advice
    assert run(request(model, "bf16"), settled).ok, "the next run connects anew"
    assert ray_actors.wait_until(lambda: not before & ours()), "actors outlived their driver"


# ---------------------------------------------------------------- minutes


@pytest.mark.slow
@pytest.mark.parametrize("kind, message, after_s", MANY)
def test_an_actor_that_is_killed_at_any_moment(settled, model, kind, message, after_s):
    document = killed_at(settled, request(model, new=120), kind, message, after_s)
    check_contained(settled, model, document, kind)
    assert run(request(model), settled).ok
    assert len(ours()) == 3, "an actor was left over"


@pytest.mark.slow
def test_actors_end_with_the_app_however_it_ends(machines, model):
    before = set(ray_actors.actors())
    code = (
        "import sys, time, comparator\n"
        f"comparator.run('Hi', ['fp32'], {model!r}, max_new_tokens=4)\n"
        "print('ready', flush=True)\n"
        "time.sleep(600)\n"
    )
    app = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"COMPARATOR_RAY_ADDRESS": machines.address},
    )  # fmt: skip
    try:
        assert app.stdout.readline().strip() == "ready"
        appeared = set(ray_actors.actors()) - before
        assert len(appeared) == 2
        app.kill()
        assert ray_actors.wait_until(lambda: not appeared & set(ray_actors.actors()), 30), (
            "kill -9 left actors behind"
        )
    finally:
        app.kill()


@pytest.mark.slow
def test_nobody_at_the_address_is_told(monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "3")
    engine = ClusterEngine(Settings(ray_address="127.0.0.1:6398"))
    with pytest.raises(UserError) as refused:
        engine.encode("smollm2-135m", "Hi", None, None)
    assert "6398" in refused.value.problem and "COMPARATOR_RAY_ADDRESS" in refused.value.advice
    assert engine.state().problem.problem == refused.value.problem, "the head line must say it too"


def begin_head(port: int) -> list[int]:
    """`ray start --head` as people use it; the ids of what it started."""
    import psutil

    before = set(psutil.pids())
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", f"--port={port}", "--num-cpus=1",
               "--object-store-memory=100000000", "--memory=4000000000", "--include-dashboard=false",
               "--disable-usage-stats", "--node-name=solo"]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    names = ("gcs_server", "raylet")
    return [p.pid for p in psutil.process_iter(["name"]) if p.pid not in before and p.info["name"] in names]


def end_all(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_token_that_is_there_is_given(tmp_path):
    from comparator.cluster.ray_api import has_token

    home = {"HOME": str(tmp_path)}
    assert not has_token(home) and has_token(home | {"RAY_AUTH_TOKEN": "x"})
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret\n")
    assert has_token(home) and not has_token(home | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")})


@pytest.mark.slow
def test_a_cluster_that_asks_for_a_token(model, tmp_path, monkeypatch):
    """As Ray 2.59 starts it on a machine that has a token: with the token's file it works, without it is said."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("a" * 64)
    settings = Settings(ray_address="127.0.0.1:6412")
    pids = begin_head(6412)
    try:
        engine = ClusterEngine(settings)
        assert run(request(model, "fp32"), engine).ok, "the token was not given"
        engine.close()
        monkeypatch.setenv("HOME", str(tmp_path / "elsewhere"))
        stranger = ClusterEngine(settings)
        with pytest.raises(UserError) as refused:
            stranger.encode(model, "Hi", None, None)
        assert "auth_token" in refused.value.advice
        stranger.close()
    finally:
        end_all(pids)


@pytest.mark.slow
def test_room_is_made_within_the_budget_of_a_node(machines, model):
    """Each node may hold one of the three; the least recently used is unloaded, and loaded again when it is needed. The
    one whose logits the others are compared with stays."""
    engine = ClusterEngine(Settings(ray_address=machines.address, memory_budget="180KB"))
    try:
        document = run(request(model, "fp32", "int8:dtype=fp32", "bf16", fidelity="prompt"), engine)
        assert document.ok and all(c.fidelity.prompt for c in document.cells), [
            (c.variant, c.notes, c.error, c.fidelity) for c in document.cells
        ]
        by_node: dict[str, int] = {}
        for held in engine.state().residents:
            by_node[held.node] = by_node.get(held.node, 0) + held.bytes
        assert by_node and max(by_node.values()) <= 180_000
        assert ray_actors.wait_until(lambda: len(ray_actors.actors()) <= 3), (
            f"two variants and what reads checkpoints: {ray_actors.actors()}, {engine.state().residents}"
        )
    finally:
        engine.close()


@pytest.mark.slow
def test_ten_visitors_are_served_in_turn(settled, model):
    results: dict[int, list] = {}

    def visit(number: int) -> None:
        wanted = request(model, fidelity="prompt")
        results[number] = list(compare(wanted, engine=settled))

    visitors = [threading.Thread(target=visit, args=(n,)) for n in range(10)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join(300)
    documents = [results[n][-1].comparison for n in range(10)]
    assert all(d.ok for d in documents)
    assert len({d.cells[0].token_ids for d in documents}) == 1, "visitors disturbed each other"
    assert not settled.queue.busy


@pytest.mark.slow
def test_a_head_that_is_lost_is_told_and_found_again(model):
    """`ray start` as people use it, on a port of its own. Ray gives a driver up after 20 s without the head."""
    pids = begin_head(6411)
    engine = ClusterEngine(Settings(ray_address="127.0.0.1:6411"))
    try:
        assert run(request(model, "fp32"), engine).ok
        end_all(pids)
        began = time.monotonic()
        with pytest.raises(UserError):
            document = run(request(model, "fp32", "bf16"), engine)
            failed = next(c for c in document.cells if c.status == "failed")
            raise UserError(failed.error.problem, failed.error.advice)
        assert time.monotonic() - began < 120, "nobody waits that long for a head that is gone"
        pids = begin_head(6411)
        assert run(request(model, "fp32"), engine).ok, "when the head is back the app connects anew"
    finally:
        engine.close()
        end_all(pids)
