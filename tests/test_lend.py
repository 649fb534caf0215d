"""A comparison on a device that is lent: in a process of its own, in one call, and stopped by letting go of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from comparator import lend
from comparator.backends import resolve
from comparator.types import Cell, GenerationSettings, Problem, Request

ROOT = Path(__file__).resolve().parents[1]

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
from comparator import lend, zerogpu
from comparator.backends import resolve
from comparator.types import Cell, Done, Generating, GenerationSettings, Request
import spaces
def ask(tokens):
    cells = (Cell(resolve("bf16")), Cell(resolve("nf4")))
    return Request("smollm2-135m", cells, "Say hello.", settings=GenerationSettings(max_new_tokens=tokens), fidelity="none")
for _ in range(2):
    *_, last = lend.compare(ask(3), threading.Event())
stop, seen = threading.Event(), 0
for event in lend.compare(ask(200), stop):
    if isinstance(event, Generating):
        seen += 1
        stop.set()
print(json.dumps({
    "active": zerogpu.active(), "done": isinstance(last, Done), "asked": spaces.asked, "seen_after_stop": seen,
    "statuses": [c.status for c in last.comparison.cells], "torch_here": "torch" in sys.modules,
}))
"""


def request(**changes) -> Request:
    return Request(**{"model": "smollm2-135m", "cells": (Cell(resolve("bf16")),), "prompt": "Hi", **changes})


def test_without_zerogpu_it_is_the_comparison_itself():
    assert lend._lent is lend._columns
    with pytest.raises(Problem, match="empty"):
        lend.compare(request(prompt=" "), threading.Event())


def test_a_lent_device_runs_all_columns_in_one_call(builtin, tmp_path):
    (tmp_path / "spaces.py").write_text(PACKAGE)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT, timeout=300,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "SPACES_ZERO_GPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["active"] and told["done"] and told["statuses"] == ["ok", "ok"]
    assert len(told["asked"]) == 3, "one call for all columns of a comparison"
    assert told["asked"][0] < told["asked"][2] <= 120, "longer answers ask for longer"
    assert told["seen_after_stop"] == 1, "Stop has to let go of the device"
    assert not told["torch_here"], "torch belongs into the lent process"


def test_events_end_with_stop_and_let_go():
    let_go = []

    def events():
        try:
            yield from range(10)
        finally:
            let_go.append(True)

    stop, seen = threading.Event(), []
    for event in lend._until(events(), stop):
        seen.append(event)
        if event == 2:
            stop.set()
    assert seen == [0, 1, 2] and let_go


def test_a_wrong_request_is_refused_before_a_device_is_asked_for(monkeypatch):
    monkeypatch.setattr(lend.zerogpu, "active", lambda: True)
    monkeypatch.setattr(lend, "_lent", lambda _: pytest.fail("a device was asked for"))
    with pytest.raises(Problem):
        lend.compare(request(settings=GenerationSettings(max_new_tokens=0)), threading.Event())
