"""Which clients of the API still wait for their answer: a program that hung up keeps nobody else waiting.

A program posts its call and reads the answer from another address; the post is over at once, so only the reading tells
whether somebody is there. `Listening` is ASGI middleware that notes when a reader comes and goes.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict
from urllib.parse import parse_qs

from comparator.ui.gradio_compat import CALL_PATH, HEARTBEAT_PATH, STREAM_PATH, has_messages

NEVER_CAME_S = 60.0  # a program may take so long to begin to read
GONE_S = 3.0  # and may be away so long, say to connect again
CLOSED_S = 3600.0  # what belongs to a page outlives its closing, since a laptop may sleep
NEVER_OPENED_S = 600.0  # what belongs to a session that has no page outlives its last event
_MOST = 10_000


class Listeners:
    """Readers by session: how many there are, and when the last one left. Thread-safe."""

    def __init__(self):
        self._readers: OrderedDict[str, tuple[int, float]] = OrderedDict()
        self._lock = threading.Lock()

    def note(self, session: str, change: int) -> None:
        with self._lock:
            count, _ = self._readers.pop(session, (0, 0.0))
            self._readers[session] = (max(0, count + change), time.monotonic())
            while len(self._readers) > _MOST:
                self._readers.popitem(last=False)

    def is_reading(self, session: str) -> bool:
        """Whether somebody reads the answers of this session."""
        with self._lock:
            return self._readers.get(session, (0, 0.0))[0] > 0

    def hung_up(self, session: str | None, since_s: float) -> bool:
        """Whether nobody reads the answer to a call of this session, which came at `since_s` (`time.monotonic()`)."""
        if not session:
            return False  # over a connection of its own, or in this process
        with self._lock:
            count, changed_s = self._readers.get(session, (0, 0.0))
        now_s = time.monotonic()
        if changed_s < since_s and not count:
            return now_s - since_s > NEVER_CAME_S
        return not count and now_s - changed_s > GONE_S

    def is_over(self, session: str, idle_s: float) -> bool:
        """Whether the page of this session, whose last event was `idle_s` seconds ago, will not be used again."""
        with self._lock:
            count, changed_s = self._readers.get(session, (0, None))
        if count:
            return False
        if changed_s is None:
            return idle_s > NEVER_OPENED_S
        return min(idle_s, time.monotonic() - changed_s) > CLOSED_S


LISTENERS = Listeners()
PAGES = Listeners()  # open pages, which read a heartbeat


class Listening:
    """ASGI middleware that tells `listeners` who reads the answer to a call, and `pages` which pages are open."""

    def __init__(self, app, listeners: Listeners = LISTENERS, pages: Listeners = PAGES):
        self.app, self.listeners, self.pages = app, listeners, pages

    async def __call__(self, scope, receive, send) -> None:
        session = _session(scope)
        if session is None:
            await self.app(scope, receive, send)
            return
        if scope["path"].endswith(STREAM_PATH) and not has_messages(scope, session):
            await _nothing_to_read(send)
            return
        listeners = self.pages if HEARTBEAT_PATH in scope["path"] else self.listeners
        listeners.note(session, 1)
        try:
            await self.app(scope, receive, send)
        finally:
            listeners.note(session, -1)


async def _nothing_to_read(send) -> None:
    """What Gradio sends to a session that it does not know; it logs a traceback for each, which strangers can cause."""
    message = {
        "msg": "unexpected_error",
        "message": "404: Not Found",
        "success": False,
        "session_not_found": True,
    }
    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": f"data: {json.dumps(message)}\n\n".encode()})


def _session(scope) -> str | None:
    """The session whose answers or heartbeat are read by this request; None for any other one."""
    if scope["type"] != "http" or scope["method"] != "GET":
        return None
    path = scope["path"]
    if path.endswith(STREAM_PATH):
        return parse_qs(scope.get("query_string", b"")[:2000].decode("latin-1")).get("session_hash", [""])[0]
    if CALL_PATH in path or HEARTBEAT_PATH in path:
        return path.rstrip("/").rpartition("/")[2][:100]
    return None
