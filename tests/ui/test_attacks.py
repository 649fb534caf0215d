"""What one stranger sends to a public server, over HTTP as a program would, against the app as `make run` starts it.

Each attack has a bound on the server's memory or time. `Stranger` calls private events as the page's own scripts do.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
from model_hub import ModelHub, model_hub

from comparator.adapters.locate import builtin_path
from comparator.ui.gradio_compat import API_PREFIX, STREAM_PATH


class Stranger:
    """A program that knows what the page's scripts know."""

    def __init__(self, server: Any):
        self.server = server
        self.process = psutil.Process(server.process.pid)
        config = json.loads(self.get("config")[1])
        self.events, self.kinds = config["dependencies"], {c["id"]: c for c in config["components"]}

    def get(self, path: str) -> tuple[int, bytes]:
        return _answer(urllib.request.Request(self.server.url + path))

    def post(self, path: str, body: Any) -> tuple[int, bytes]:
        data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
        return _answer(urllib.request.Request(self.server.url + path, data, headers))

    def event_of(self, id: str, event: str) -> int:
        """The number of the listener on the component with this id on the page."""
        place = next(n for n, c in self.kinds.items() if c["props"].get("elem_id") == id)
        return next(e["id"] for e in self.events if [place, event] in [list(t) for t in e["targets"]])

    def send(self, event: int, session: str, data: list[Any]) -> int:
        body = {"fn_index": event, "session_hash": session, "data": data}
        return self.post(f"{API_PREFIX.strip('/')}/queue/join", body)[0]

    def answer(self, session: str) -> bytes:
        """What the server has sent for a session until its event was over."""
        return self.get(f"{STREAM_PATH.strip('/')}?session_hash={session}")[1]

    @property
    def megabytes(self) -> float:
        return self.process.memory_info().rss / 1e6


def _answer(request: urllib.request.Request) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()
    except (urllib.error.URLError, ConnectionError):  # refused before the whole body was sent
        return 0, b""


@pytest.fixture(scope="module")
def hub() -> Iterator[ModelHub]:
    """A stand-in for the Hub, which a stranger's slow server is too."""
    with model_hub() as server:
        yield server


@pytest.fixture(scope="module")
def stranger(serve_file, hub, tmp_path_factory) -> Stranger:
    home = str(tmp_path_factory.mktemp("hf"))
    return Stranger(
        serve_file(COMPARATOR_PUBLIC="1", HF_ENDPOINT=hub.url, HF_HOME=home, HF_HUB_CACHE=f"{home}/hub")
    )


def test_adapters_from_a_slow_server_are_opened_some_at_a_time(stranger, hub):
    """Eighty threads serve all pages, and each adapter that a form opens waits for its file in one of them."""
    files = {p.name: p.read_bytes() for p in builtin_path("pirate").iterdir()}
    for number in range(100):
        hub.add(f"slow/adapter-{number}", files | {"README.md": str(number).encode()}, parameters=None)
    hub.chunk_s = 5.0
    event, add = stranger.event_of("adapter-source", "submit"), stranger.event_of("custom-add", "click")
    inputs = next(e["inputs"] for e in stranger.events if e["id"] == event)
    boxes = {stranger.kinds[i]["props"].get("elem_id"): n for n, i in enumerate(inputs)}
    try:
        for number in range(100):
            data: list[Any] = [None] * len(inputs)
            data[boxes["adapters"]], data[boxes["adapter-source"]] = [], f"slow/adapter-{number}"
            assert stranger.send(event, f"slow-{number}", data) == 200
        time.sleep(10)  # until they have begun
        asked_for = {path for _, path in hub.requests if "/resolve/" in path}
        assert len(asked_for) <= 2 * 8, (
            f"{len(asked_for)} files are fetched at once for forms of one stranger"
        )
        began_s = time.monotonic()
        asked = next(e["inputs"] for e in stranger.events if e["id"] == add)
        texts = {"custom-notation": "nf4:skip=lm_head"}
        assert (
            stranger.send(
                add, "honest", [texts.get(stranger.kinds[i]["props"].get("elem_id")) for i in asked]
            )
            == 200
        )
        assert b"process_completed" in stranger.answer("honest")
        assert time.monotonic() - began_s < 20, "one stranger's adapters stop everybody's page"
    finally:
        hub.chunk_s = 0.0


def test_lists_of_boxes_are_not_kept_for_sessions_that_nobody_opened(stranger):
    """Last, since it uses up what one address may send in a minute. 8 MB for each invented session, a thousand sessions: 8 GB."""
    event, before = stranger.event_of("columns", "input"), stranger.megabytes
    labels = ["x" * 7_000] * 1_100
    statuses = [stranger.send(event, f"invented-{n}", [labels, []]) for n in range(40)]
    assert set(statuses) - {200}, "one visitor may send any number of bytes in a minute"
    deadline = time.monotonic() + 30
    while stranger.megabytes - before > 150 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert stranger.megabytes - before < 150
