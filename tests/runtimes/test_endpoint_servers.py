"""Servers as people run them, on loopback: llama.cpp's own (xllamacpp), and `transformers serve`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest

from comparator.backends import resolve
from comparator.comparison.runner import run
from comparator.core.request import BUILTIN_MODEL, GenerationSettings, Request
from comparator.core.variant import Cell
from comparator.engines import get_engine

pytestmark = pytest.mark.slow
PROMPT = "Name three colours of a rainbow."
LLAMA = textwrap.dedent(
    """
    import sys, time, xllamacpp
    params = xllamacpp.CommonParams()
    params.model.path, params.port = sys.argv[1], int(sys.argv[2])
    params.n_ctx, params.n_parallel, params.verbosity = 1024, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    sys.stdin.read()
    """
)


@pytest.fixture
def served():
    """`served(command, port)` starts a server and waits until it answers; returns its address."""
    started = []

    def start(command: list[str], port: int) -> str:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                   env=os.environ | {"HF_HUB_OFFLINE": "1"})  # fmt: skip
        started.append(process)
        url = f"http://127.0.0.1:{port}/v1"
        deadline = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(url.replace("/v1", "/health"), timeout=5):
                    return url
            except OSError:
                assert process.poll() is None, f"the server ended: {' '.join(command)[:200]}"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.2)

    yield start
    for process in started:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


def compare(model: str, url: str, settings_env, tokens: int = 16, reference: str = "bf16"):
    settings_env(endpoints=f"local={url}")
    cells = tuple(Cell(resolve(n)) for n in (reference, "endpoint@local"))
    request = Request(model, cells, PROMPT, settings=GenerationSettings(max_new_tokens=tokens))
    made = run(replace(request, reference=cells[0]), engine=get_engine(), emit=lambda event: None)
    get_engine().unload()
    server = made.cells[1]
    assert server.status == "ok", server.error
    assert len(server.token_ids) <= tokens and server.text and server.finish_reason in ("eos", "length")
    assert server.latency.ttft_s > server.latency.round_trip_s > 0 and server.latency.decode_tok_s > 0
    return made


def test_llama_cpps_own_server(served, settings_env):
    pytest.importorskip("xllamacpp")
    from comparator.sources.builtin import find_gguf

    port = free_port()
    url = served([sys.executable, "-c", LLAMA, str(find_gguf()[0]), str(port)], port)
    server = compare(BUILTIN_MODEL, url, settings_env).cells[1]
    assert server.kernel.startswith("llama.cpp") and server.decode_path == "server, token ids"
    assert any("quantization Q4_1" in note for note in server.notes), (
        "what the server says of itself is not shown"
    )
    prompt = server.fidelity.prompt
    assert prompt.forced and prompt.top_k == 20
    assert sum(prompt.kl) / len(prompt.kl) < 0.02, "the file that the bf16 was made from diverges from it"
    assert all(token.p <= 1 for top in prompt.top for token in top)


def test_transformers_serve(served, settings_env, two_layers: Path):
    """It takes no token ids, no field beyond OpenAI's, and gives no log-probabilities."""
    from transformers.utils.import_utils import is_serve_available

    assert is_serve_available(), "fastapi, uvicorn and openai are among the requirements of the tests"
    port = free_port()
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(two_layers), "--port", str(port),
               "--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]  # fmt: skip
    url = served(command, port)
    reference, server = compare(str(two_layers), f"{url}#{two_layers}", settings_env, reference="fp32").cells
    assert server.decode_path == "server, rendered text"
    prompt = server.fidelity.prompt
    assert prompt is not None, server.fidelity.refused
    assert prompt.top_k == 0 and prompt.kl == ()
    assert server.text == reference.text, "the same weights on the same prompt give the same greedy answer"
