"""Guessing a password is slow."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace

from comparator.core.settings import Settings
from comparator.ui import login_guard
from comparator.ui.login_guard import LoginGuard


def test_an_address_that_guesses_is_locked_out_and_others_are_not(monkeypatch):
    now, answers = SimpleNamespace(s=0.0), []
    monkeypatch.setattr(login_guard, "time", SimpleNamespace(monotonic=lambda: now.s))

    async def wrong(scope, receive, send):
        await send({"type": "http.response.start", "status": 400, "headers": []})

    async def send(message):
        if message["type"] == "http.response.start":
            answers.append(message["status"])

    guard = LoginGuard(wrong, Settings(public=False, behind_proxy=False))

    def ask(address: str, path: str = "/login") -> int:
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "client": (address, 1)}
        thread = threading.Thread(target=asyncio.run, args=(guard(scope, None, send),))
        thread.start()
        thread.join(10)
        return answers[-1]

    assert [ask("1.1.1.1") for _ in range(12)] == [400] * 10 + [429] * 2
    assert ask("1.1.1.1", "/login/") == 429 and ask("1.1.1.1", "/other") == 400 and ask("2.2.2.2") == 400
    for number in range(100):
        ask(f"3.3.3.{number}")
    assert ask("4.4.4.4") == 429, "whoever has many addresses guesses without end"
    now.s += login_guard.WINDOW_S + 1
    assert ask("1.1.1.1") == 400
