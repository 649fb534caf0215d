"""What libraries raise, as people read it."""

from __future__ import annotations

import errno
import gc
import os
import socket
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import tiny_models

from comparator.backends import resolve
from comparator.comparison.runner import compare
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.events import Done, Failed
from comparator.core.messages import LoadRequest
from comparator.core.request import GenerationSettings, Request
from comparator.core.settings import Settings
from comparator.core.variant import Cell
from comparator.engine.explain import explain, explained
from comparator.engine.local import LocalEngine
from comparator.util import error_log
from comparator.util.cuda_errors import DAMAGED

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def undamaged():
    """The GPU of this process is in order again after each test."""
    yield
    DAMAGED.clear()


@pytest.mark.parametrize(
    "error, names",
    [
        (MemoryError(), "Out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "Out of memory",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
        (ImportError("libfoo.so"), "missing or broken"),
        (RuntimeError("size mismatch for lm_head"), "do not fit"),
        (RuntimeError("something odd"), "something odd"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "context is damaged"),
    ],
)
def test_each_has_a_cause_and_a_way_out(error, names):
    problem = explain(error, "load nf4")
    assert names in problem.problem and problem.advice


def test_problems_pass():
    problem = UserError("a", "b")
    assert explain(problem) is problem
    assert problem.report is None, "a wrong input is not an entry of the error log"


def test_a_problem_that_a_library_caused_is_logged_with_its_cause():
    with pytest.raises(UserError) as raised, explained("load nf4"):
        try:
            raise KeyError("no_such_activation")
        except KeyError as error:
            raise UserError("transformers cannot load it.", "Check it.") from error
    assert "KeyError: 'no_such_activation'" in raised.value.report.traceback
    assert raised.value.__cause__.__traceback__ is None, "its frames are held, and with them its tensors"


def test_a_panic_of_a_rust_library_is_explained_too():
    """It is no Exception: it went past every handler, and the page showed nothing."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({"x": 0}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(x+x+)+y"), "isolated")
    with pytest.raises(UserError, match="Could not encode the prompt"), explained("encode the prompt"):
        tokenizer.encode("x" * 100)
    with pytest.raises(KeyboardInterrupt), explained("encode the prompt"):
        raise KeyboardInterrupt


def test_a_damaged_gpu_is_not_called_out_of_memory():
    problem = explain(RuntimeError("CUDA error: device-side assert triggered"), "generate")
    assert "Out of memory" not in problem.problem and "started again" in problem.advice


def test_a_damaged_gpu_is_asked_for_nothing_more_and_the_page_says_so():
    from comparator.ui.panel import header

    engine, raised = LocalEngine(Settings()), RuntimeError("CUDA error: device-side assert triggered")
    assert engine.environment() and engine.state().problem is None
    with pytest.raises(UserError, match="context is damaged"), explained("generate"):
        raise raised
    for ask in (engine.environment, engine.unload):
        with pytest.raises(UserError, match="damaged by an earlier error"):
            ask()
    line = header.render(engine.state())
    assert "damaged by an earlier error" in line and "started again" in line


@pytest.mark.skipif(not hasattr(os, "fork"), reason="exec keeps the process only on Unix")
def test_a_program_with_a_damaged_gpu_starts_itself_again():
    """The port is free again, and threads of the old process are gone."""
    script = """
import os, socket, sys, threading
from comparator.deploy import restart
from comparator.engine.queue import FairQueue
from comparator.util import cuda_errors

restart._TOLD_S = restart._ENDED_S = 0.0
port, lives = int(sys.argv[1]), int(os.environ.get(restart._COUNT, "0"))
listening = socket.socket()
listening.bind(("127.0.0.1", port))
listening.listen()
print("life", lives, os.getpid(), sys.argv[1:], flush=True)
if lives == 2:
    sys.exit(0)
queue = FairQueue()
restart.when_damaged(queue)
cuda_errors.note(RuntimeError("CUDA error: device-side assert triggered"))
with queue.turn(threading.Event()):
    threading.Event().wait(60)
"""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ran = subprocess.run(
        [sys.executable, "-c", script, str(port), "--flag"],
        capture_output=True,
        text=True,
        timeout=50,
        cwd=ROOT,
    )
    lives = [line.split(maxsplit=3) for line in ran.stdout.splitlines()]
    assert [life[1] for life in lives] == ["0", "1", "2"], ran.stderr
    assert len({life[2] for life in lives}) == 1 and {life[3] for life in lives} == {f"['{port}', '--flag']"}


def test_visitors_of_a_public_installation_see_no_paths(settings_env):
    error = FileNotFoundError("no such file: '/srv/models/secret/config.json'")
    assert "/srv/models" in explain(error, "load").problem
    settings_env(public=1)
    assert "/srv/models" not in explain(error, "load").problem


def test_the_frames_of_an_error_are_freed():
    import torch

    tensors: list = []

    def fail() -> None:
        large = torch.zeros(1000)
        tensors.append(weakref.ref(large))
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise RuntimeError("outer") from error

    with pytest.raises(UserError) as raised, explained("load nf4"):
        fail()
    gc.collect()
    assert tensors[0]() is None, "a frame of the traceback is held: out of memory would keep its memory"
    assert "in fail" in raised.value.report.traceback


def test_a_forward_that_fails_can_be_reported(own_dirs):
    """A real engine, a model whose second layer raises, and a comparison of it: the log holds what a report needs."""
    folder = own_dirs / "model"
    tiny_models.save(folder, "llama")
    engine = LocalEngine(Settings())
    prompt = "What is the capital of Atlantis?"
    cells = tuple(Cell(resolve(v)) for v in ("fp32", "bf16"))
    loaded = engine.load(LoadRequest(str(folder), cells[0].variant), threading.Event())

    def break_layer() -> None:
        def fail(*_):
            raise LookupError(f"the layer is broken by hf_abcdefgh1234, {prompt}")

        engine.slot(loaded.handle).model.model.layers[1].register_forward_pre_hook(fail)

    engine._call(break_layer)
    request = Request(
        str(folder), cells, prompt, settings=GenerationSettings(max_new_tokens=2), fidelity="none", chat=False
    )
    *events, done = compare(request, engine=engine)
    (failed,) = [e for e in events if isinstance(e, Failed)]
    assert isinstance(done, Done) and [c.status for c in done.comparison.cells] == ["failed", "ok"]
    error = failed.result.error
    assert "LookupError" in error.problem and error.error_id
    log = error_log.log_file().read_text()
    assert error.error_id in log and "in fail" in log and "modeling_llama" in log
    assert "max_new_tokens=2" in log, "the request that failed is not in the log"
    saved = document.dumps(done.comparison)
    for text, place in (
        (log, "log"),
        (error_log.find(error.error_id).details, "details"),
        (error.problem, "card"),
    ):
        assert "Atlantis" not in text, f"the prompt is in the {place}"
        assert "abcdefgh1234" not in text, f"a token is in the {place}"
    assert str(error_log.log_file()) not in saved, "a path of this machine is in the document"
    assert document.loads(saved).cells[0].error.error_id == error.error_id
