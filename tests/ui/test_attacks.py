"""What one stranger sends to a public server, over HTTP as a program would, against the app as `make run` starts it.

Each attack has a bound on the server's memory or time. `Stranger` calls private events as the page's own scripts do.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

import psutil
import pytest

from comparator.ui.gradio_compat import API_PREFIX


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
def stranger(serve_file) -> Stranger:
    return Stranger(serve_file(COMPARATOR_PUBLIC="1", COMPARATOR_TRAINING="1"))


def test_lists_of_boxes_are_not_kept_for_sessions_that_nobody_opened(stranger):
    """8 MB for each invented session, a thousand sessions: 8 GB."""
    event, before = stranger.event_of("columns", "input"), stranger.megabytes
    labels = ["x" * 7_000] * 1_100
    statuses = [stranger.send(event, f"invented-{n}", [labels, []]) for n in range(40)]
    assert set(statuses) - {200}, "one visitor may send any number of bytes in a minute"
    deadline = time.monotonic() + 30
    while stranger.megabytes - before > 150 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert stranger.megabytes - before < 150
