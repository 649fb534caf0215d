"""A server swept by concurrency (tests/openai_server.py): how many requests it gets at once, the goodput, and what fails."""

from __future__ import annotations

import json
import threading

import pytest
import tiny_models
from openai_server import OpenAIServer, script
from typer.testing import CliRunner

from comparator.backends import resolve
from comparator.capacity import points, sweep, sweep_words
from comparator.core.errors import Stopped
from comparator.engines import get_engine

CONTEXT, NEW = 8, 6
FAR = 1000.0  # seconds that every request takes less than


@pytest.fixture
def serve(settings_env):
    """`serve(says=…, forms=…)` starts a server, listed as endpoint@tiny."""
    started: list[OpenAIServer] = []
    tokenizer = tiny_models.tokenizer(chat=True)

    def start(says=None, **how) -> OpenAIServer:
        endless = script([5] * 1000, tiny_models.VOCABULARY, tokenizer.eos_token_id)
        started.append(OpenAIServer(tokenizer, says or endless, **how).__enter__())
        settings_env(endpoints=f"tiny={started[-1].url}")
        return started[-1]

    yield start
    get_engine().unload()
    for server in started:
        server.__exit__()


def swept(model: str, cancel: threading.Event | None = None, **options) -> sweep.Sweep:
    chosen = points.Options(
        **{"batches": (2,), "contexts": (CONTEXT,), "new_tokens": NEW, "repeats": 2} | options
    )
    return sweep.run(get_engine(), model, [resolve("endpoint@tiny")], chosen, cancel)


def test_as_many_requests_at_once_as_were_asked_for(tiny_chat, serve):
    """The server answers nobody before three requests are there."""
    together = threading.Barrier(3)
    words = script([5] * 1000, tiny_models.VOCABULARY, 0)

    def says(ids, step):
        if step == 0 and len(ids) == CONTEXT:
            together.wait(60)
        return words(ids, step)

    server = serve(says, gives_ids=True)
    (point,) = swept(tiny_chat, batches=(3,), ttft_limit_s=FAR, itl_limit_s=FAR).points
    assert point.error is None and point.served and point.batch == 3, point.error
    bodies = [body for _, _, body in server.requests if len(body.get("prompt", ())) == CONTEXT]
    timed = [body for body in bodies if body["max_tokens"] == NEW]
    assert len(timed) == 3 * points.IN_TURN * 2 and all(body["ignore_eos"] for body in timed)
    assert len({tuple(body["prompt"]) for body in bodies}) == len(bodies), (
        "a server may keep what it computed of a prompt"
    )
    assert len(point.runs) == 2 and min(point.runs) > 0 and point.ttft_s > 0
    assert 0 < point.itl_p50_s <= point.itl_p99_s
    assert point.good_share == 1 and point.good_per_s > 0 and point.peak_bytes is None and not point.note


def test_requests_that_miss_a_limit_do_not_count(tiny_chat, serve):
    serve()
    made = swept(tiny_chat, batches=(1, 2), itl_limit_s=1e-9)
    assert [(p.good_share, p.good_per_s) for p in made.points] == [(0, 0), (0, 0)]
    said = list(sweep_words.remarks(made))
    assert any(
        "endpoint@tiny: at least 95 % of the requests meet ITL" in s and "at no batch" in s for s in said
    ), said


def test_what_fails_is_missing_from_the_goodput(tiny_chat, serve):
    server = serve()
    assert swept(tiny_chat).points[0].error is None
    server.fault, server.healthy = "429", 6  # the warm-up, and some of those timed
    (point,) = swept(tiny_chat, ttft_limit_s=FAR).points
    assert (
        0 < point.good_share < 1 and "requests failed: endpoint@tiny accepts no more requests" in point.note
    )
    server.healthy = 0
    (point,) = swept(tiny_chat).points
    assert "accepts no more requests" in point.error and not point.runs


def test_a_server_that_takes_plain_text_only_and_ends_early(tiny_chat, serve):
    tokenizer = tiny_models.tokenizer(chat=True)
    serve(script([5, 6, 7], tiny_models.VOCABULARY, tokenizer.eos_token_id), forms=("text",), fields=())
    (point,) = swept(tiny_chat).points
    assert point.runs and "8 of 8 answers ended early" in point.note, (point.error, point.note)


def test_stop_ends_the_requests(tiny_chat, serve):
    cancel, server = threading.Event(), None
    words = script([5] * 1000, tiny_models.VOCABULARY, 0)

    def says(ids, step):
        if step == 3 and len(ids) == CONTEXT + 3:
            cancel.set()
            server.closed.wait(60)  # silent until the test is over
        return words(ids, step)

    server = serve(says)
    with pytest.raises(Stopped):
        swept(tiny_chat, cancel)


def test_the_command(tiny_chat, serve, tmp_path, monkeypatch):
    from comparator.cli import app

    serve()
    out = tmp_path / "sweep.json"
    command = [
        "sweep",
        "-m",
        tiny_chat,
        "-v",
        "endpoint@tiny",
        "--concurrency",
        "1,2",
        "--context",
        str(CONTEXT),
        "--new-tokens",
        str(NEW),
    ]
    result = CliRunner().invoke(
        app, [*command, "--repeats", "1", "--ttft", "1000s", "--itl", "1000s", "-o", str(out)]
    )
    assert result.exit_code == 0, result.output
    assert "good %" in result.output and "meet TTFT ≤ 1,000 s and ITL ≤ 1,000 s up to batch 2" in " ".join(
        result.output.split()
    )
    assert [p["good_share"] for p in json.loads(out.read_text())["points"]] == [1, 1]
