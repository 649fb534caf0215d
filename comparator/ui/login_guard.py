"""Slows the guessing of passwords: after some wrong ones an address waits, and so does everybody after many."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque

from comparator.core.settings import Settings
from comparator.deploy.limits import visitor

WINDOW_S = 300.0
MOST_WRONG = 10  # of one address within WINDOW_S
MOST_WRONG_TOTAL = 100  # of all together: addresses are cheap


class LoginGuard:
    """ASGI middleware before Gradio's own login, which answers a wrong password with 400."""

    def __init__(self, app, settings: Settings):
        self.app, self.settings = app, settings
        self._wrong: deque[tuple[float, str]] = deque(maxlen=MOST_WRONG_TOTAL)
        self._lock = threading.Lock()

    async def __call__(self, scope, receive, send) -> None:
        if (
            scope["type"] != "http"
            or scope["method"] != "POST"
            or not scope["path"].rstrip("/").endswith("/login")
        ):
            await self.app(scope, receive, send)
            return
        headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in scope.get("headers", ())}
        who = visitor(headers, (scope.get("client") or (None,))[0], self.settings)
        attempt = (time.monotonic(), who)
        if not self._begins(attempt):
            body = b'{"detail": "Too many wrong passwords. Try again in some minutes."}'
            kind = [
                (b"content-type", b"application/json"),
                (b"retry-after", b"300"),
                (b"connection", b"close"),
            ]
            await send({"type": "http.response.start", "status": 429, "headers": kind})
            await send({"type": "http.response.body", "body": body})
            return

        async def watched(message) -> None:
            if message["type"] == "http.response.start" and message["status"] not in (400, 401):
                with self._lock, contextlib.suppress(ValueError):  # many later ones may have pushed it out
                    self._wrong.remove(attempt)
            await send(message)

        await self.app(scope, receive, watched)

    def _begins(self, attempt: tuple[float, str]) -> bool:
        """Whether this address may try. Then it counts as wrong until it is answered: guesses that are sent at once would
        else all come before the first answer."""
        now_s, who = attempt
        with self._lock:
            recent = [w for at_s, w in self._wrong if now_s - at_s < WINDOW_S]
            if recent.count(who) >= MOST_WRONG or len(recent) >= MOST_WRONG_TOTAL:
                return False
            self._wrong.append(attempt)
            return True
