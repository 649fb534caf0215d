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


def test_guesses_that_are_sent_at_once_are_no_way_around():
    answers, tried = [], []

    async def slow(scope, receive, send):
        tried.append(scope["client"])
        await asyncio.sleep(0.2)  # until all of them have come
        await send({"type": "http.response.start", "status": scope["status"], "headers": []})

    async def send(message):
        if message["type"] == "http.response.start":
            answers.append(message["status"])

    guard = LoginGuard(slow, Settings(public=False, behind_proxy=False))

    async def at_once(count: int, status: int, address: str) -> None:
        scope = {"type": "http", "method": "POST", "path": "/login", "headers": [], "client": (address, 1)}
        await asyncio.gather(*(guard(scope | {"status": status}, None, send) for _ in range(count)))

    def ask(*arguments) -> None:
        thread = threading.Thread(target=asyncio.run, args=(at_once(*arguments),))
        thread.start()
        thread.join(20)

    ask(60, 400, "1.1.1.1")
    assert len(tried) == login_guard.MOST_WRONG and answers.count(429) == 50
    for _ in range(30):
        ask(1, 200, "2.2.2.2")
    assert answers[-30:] == [200] * 30, "who logs in rightly is counted as guessing"
