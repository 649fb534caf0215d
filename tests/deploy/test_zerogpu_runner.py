"""A comparison on a device that is lent: in a process of its own, in one call, and stopped by letting go of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from comparator.backends import resolve
from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings, Request
from comparator.core.variant import Cell
from comparator.deploy import zerogpu_runner
from comparator.deploy.process_engine import process_engine

ROOT = Path(__file__).resolve().parents[2]

# As the package does it: each call runs in a forked process, what it yields is pickled on its way here.
PACKAGE = """
import multiprocessing, pickle
asked, context = [], multiprocessing.get_context("fork")
def GPU(task=None, *, duration=None, size=None):
    def lent(*args):
        asked.append(duration(*args) if callable(duration) else duration)
        ours, theirs = context.Pipe(duplex=False)
        def work():
            for item in task(*pickle.loads(pickle.dumps(args))):
                theirs.send(item)
            theirs.send(None)
        process = context.Process(target=work)
        process.start()
        try:
            while (item := ours.recv()) is not None:
                yield item
        finally:
            process.kill()
            process.join()
    return lent
"""
SCRIPT = """
import json, sys, threading
from comparator.deploy import zerogpu, zerogpu_runner
from comparator.deploy.process_engine import process_engine
from comparator.backends import resolve
from comparator.types import Cell, Done, Generating, GenerationSettings, Request
import spaces
def ask(tokens):
    cells = (Cell(resolve("bf16")), Cell(resolve("nf4")))
    return Request(sys.argv[1], cells, "Say hello.", settings=GenerationSettings(max_new_tokens=tokens), fidelity="none")
stop, seen = threading.Event(), 0
def count(event):
    global seen
    if isinstance(event, Generating):
        seen += 1
        stop.set()
zerogpu_runner.run(ask(200), process_engine(), stop, count)
events = []
zerogpu_runner.run(ask(3), process_engine(), threading.Event(), events.append)
last = events[-1]
print(json.dumps({
    "active": zerogpu.active(), "done": isinstance(last, Done), "asked": spaces.asked, "seen_after_stop": seen,
    "statuses": [c.status for c in last.comparison.cells], "torch_here": "torch" in sys.modules,
}))
"""


def request(**changes) -> Request:
    return Request(**{"model": "smollm2-135m", "cells": (Cell(resolve("bf16")),), "prompt": "Hi", **changes})


def test_without_zerogpu_it_is_the_comparison_itself():
    assert zerogpu_runner._on_gpu is zerogpu_runner._columns
    with pytest.raises(UserError, match="empty"):
        zerogpu_runner.run(request(prompt=" "), process_engine(), threading.Event(), lambda event: None)


def test_a_lent_device_runs_all_columns_in_one_call(two_layers, tmp_path):
    (tmp_path / "spaces.py").write_text(PACKAGE)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(two_layers)], capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "SPACES_ZERO_GPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    on_progress = json.loads(done.stdout.splitlines()[-1])
    assert on_progress["active"] and on_progress["done"] and on_progress["statuses"] == ["ok", "ok"]
    assert len(on_progress["asked"]) == 2, (
        "one call for all columns of a comparison, and one for the next comparison"
    )
    assert on_progress["asked"][1] < on_progress["asked"][0] <= 120, "longer answers ask for longer"
    assert on_progress["seen_after_stop"] == 1, "Stop has to let go of the device"
    assert not on_progress["torch_here"], "torch belongs into the lent process"


def test_events_end_with_stop_and_let_go():
    let_go = []

    def events():
        try:
            yield from range(10)
        finally:
            let_go.append(True)

    stop, seen = threading.Event(), []
    for event in zerogpu_runner.until(events(), stop):
        seen.append(event)
        if event == 2:
            stop.set()
    assert seen == [0, 1, 2] and let_go


def test_a_wrong_request_is_refused_before_a_device_is_asked_for(monkeypatch):
    monkeypatch.setattr(zerogpu_runner.zerogpu, "active", lambda: True)
    monkeypatch.setattr(zerogpu_runner, "_on_gpu", lambda _: pytest.fail("a device was asked for"))
    with pytest.raises(UserError):
        zerogpu_runner.run(
            request(settings=GenerationSettings(max_new_tokens=0)), process_engine(), threading.Event(), print
        )
