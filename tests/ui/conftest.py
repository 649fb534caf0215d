"""A real server in a process of its own, and a real Chromium to look at it.

The form starts with the built-in model's first two layers: what they answer makes no sense, and most tests of the page
do not read it. `visitor.use(BUILTIN_MODEL)` selects the whole model.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from model_hub import ModelHub, model_hub

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Server:
    """The app as `make run` starts it."""

    url: str
    up_after_s: float
    up_after_cpu_s: float
    process: subprocess.Popen
    log: Path

    def said(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(folder: Path, **environment: str) -> Server:
    """Start app.py and wait until the page answers."""
    port, log = free_port(), folder / "server.log"
    variables = os.environ | {"COMPARATOR_PORT": str(port), "PYTHONUNBUFFERED": "1"} | environment
    began = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "app.py")],
            cwd=ROOT,
            env=variables,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    server = Server(f"http://127.0.0.1:{port}/", 0.0, 0.0, process, log)
    while time.monotonic() - began < 120:
        assert process.poll() is None, f"app.py ended by itself:\n{server.said()}"
        try:
            with urllib.request.urlopen(server.url, timeout=5) as answer:
                if answer.status == 200:
                    server.up_after_s = time.monotonic() - began
                    server.up_after_cpu_s = sum(psutil.Process(process.pid).cpu_times()[:2])
                    return server
        except OSError:
            time.sleep(0.05)
    process.kill()
    raise AssertionError(f"the page did not answer within 120 s:\n{server.said()}")


@pytest.fixture(scope="session")
def hub() -> Iterator[ModelHub]:
    """What `server` takes for the Hub: no test of the page asks the real one."""
    with model_hub() as stand_in:
        yield stand_in


@pytest.fixture(scope="session")
def server(two_layers, hub, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    started = start(folder, COMPARATOR_MODEL=str(two_layers), HF_ENDPOINT=hub.url)
    yield started
    started.process.terminate()
    try:
        started.process.wait(15)
    except subprocess.TimeoutExpired:
        started.process.kill()


@dataclass
class Visitor:
    """Somebody with the page open, and what their browser complained about."""

    page: object
    context: object
    complaints: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)  # requests to any other machine
    _listeners: list[tuple] = field(default_factory=list)

    def use(self, model: str) -> None:
        """Select another model, and wait until its facts are there."""
        self.page.wait_for_function("() => /parameters/.test(document.querySelector('#facts').innerText)")
        before = self.text("#facts")
        self.page.locator("#model input").fill(model)
        self.page.keyboard.press("Enter")
        self.page.wait_for_function(
            "(before) => { const said = document.querySelector('#facts').innerText;"
            " return said !== before && /parameters/.test(said); }",
            arg=before,
        )

    def run(
        self, *, tokens: int = 8, prompt: str | None = None, variants: tuple[str, ...] | None = None
    ) -> None:
        """Fill the form in and press Run."""
        if variants is not None:
            self.tick(*variants)
        self.page.locator("#set-max-new-tokens input").fill(str(tokens), force=True)
        if prompt is not None:
            self.page.locator("#prompt textarea").fill(prompt)
        self.page.evaluate("() => document.querySelector('#notice .bad')?.classList.remove('bad')")
        self.page.click("#run")
        # Until the page has reacted, the cards of an earlier run look like this one's.
        self.page.wait_for_function(
            "() => document.querySelector('#run').disabled || document.querySelector('#notice .bad')",
            timeout=60_000,
        )

    def tick(self, *variants: str) -> None:
        from playwright.sync_api import Error

        for row in self.page.locator(".pick").all():
            box, is_on = row.locator("input[type=checkbox]"), row.get_attribute("data-notation") in variants
            for attempt in range(5):
                if not box.is_enabled():
                    break
                try:
                    box.set_checked(is_on, force=True)
                    break
                except Error:  # the list was drawn anew between looking and clicking
                    if attempt == 4:
                        raise
                    time.sleep(0.2)

    def finished(self, timeout_s: float = 240) -> None:
        """Wait until Run can be pressed again and nothing is at work."""
        self.page.wait_for_function(
            "() => !document.querySelector('#run').disabled && document.querySelector('.card')"
            " && !document.querySelector('.card.queued, .card.loading, .card.generating, .card.answered, .card.scoring')",
            timeout=timeout_s * 1000,
        )

    def streams(self, timeout_s: float = 120) -> None:
        """Wait until an answer is being written."""
        self.page.wait_for_selector(".card.generating .answer .text", timeout=timeout_s * 1000)

    def states(self) -> dict[str, str]:
        """Column label → state word."""
        return self.page.evaluate(
            "() => Object.fromEntries([...document.querySelectorAll('.card')].map((c) =>"
            " [c.getAttribute('aria-label'), c.className.replace('card', '').trim()]))"
        )

    def tab(self, name: str) -> None:
        """Open a tab; on a narrow screen it may be in the menu behind the three dots."""
        from playwright.sync_api import TimeoutError

        shown = self.page.locator(f'button[role="tab"]:has-text("{name}"):visible').first
        menu = self.page.locator(".overflow-menu > button:visible").first
        listed = self.page.locator(f'.overflow-dropdown button:has-text("{name}"):visible').first
        for _ in range(30):  # a page that has just changed its width lays its tabs out meanwhile
            shown.or_(menu).first.wait_for()
            if not shown.count() and not listed.count():
                menu.click()
            with contextlib.suppress(TimeoutError):
                (shown if shown.count() else listed).click(timeout=3000)
                return
        raise AssertionError(f"no tab {name}, neither in the row nor in its menu")

    def text(self, selector: str) -> str:
        return self.page.locator(selector).first.inner_text()

    def listen(self, **listeners) -> None:
        for event, listener in listeners.items():
            self.page.on(event, listener)
            self._listeners.append((event, listener))

    def leave(self) -> None:
        """Leave the page, and forget who this was. The tab stays for the next one: it opens the page in half the time,
        having read its scripts before."""
        if self.page.is_closed():
            self.context.close()
            return
        for event, listener in self._listeners:
            self.page.remove_listener(event, listener)
        for page in self.context.pages:
            if page.url.startswith("http"):
                page.evaluate("() => { localStorage.clear(); sessionStorage.clear(); }")
            page.goto("about:blank") if page is self.page else page.close()
        self.context.clear_cookies()
        _FREE.append(self.page)


_FREE: list = []  # tabs that nobody uses now, each in a profile of its own


def opened(browser, url: str, width: int = 1440, height: int = 900, dark: bool = False) -> Visitor:
    """`url` in a browser profile without cookies and storage."""
    page = _FREE.pop() if _FREE else _profile(browser).new_page()
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme="dark" if dark else "light", reduced_motion="reduce")
    visitor, home = Visitor(page, page.context), url.partition("?")[0]
    visitor.listen(
        pageerror=lambda error: visitor.complaints.append(f"page error: {error}"),
        console=lambda said: visitor.complaints.append(said.text) if said.type == "error" else None,
        request=lambda asked: (
            visitor.foreign.append(asked.url)
            if asked.url.startswith("http") and not asked.url.startswith(home)
            else None
        ),
    )
    page.goto(url)
    page.wait_for_selector(".pick", state="attached")
    page.wait_for_selector("#run")
    return visitor


def _profile(browser) -> object:
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    context.set_default_timeout(90_000)  # two cores may be shared with much else
    return context


@pytest.fixture
def open_at(browser) -> Iterator:
    """`open_at(url, width=390, dark=True)` opens any address for somebody new; closed with the test, because a page that
    stays open goes on asking its server."""
    visitors: list[Visitor] = []

    def open_page(url: str, **options) -> Visitor:
        visitors.append(opened(browser, url, **options))
        return visitors[-1]

    yield open_page
    for visitor in visitors:
        visitor.leave()


@pytest.fixture
def visit(open_at, server):
    """`visit(path="?c=…", width=390, dark=True)` opens the page of `server` for somebody new."""
    return lambda path="", **options: open_at(server.url + path, **options)


@pytest.fixture
def visitor(visit) -> Visitor:
    """Somebody new at a desk."""
    return visit()


@pytest.fixture(scope="session")
def compared(browser, server) -> Iterator[Visitor]:
    """One whole comparison of bf16, int8 and nf4; tests look at it and leave it as it is."""
    visitor = opened(browser, server.url)
    visitor.run(
        tokens=12, prompt="Explain in two sentences why the sky is blue.", variants=("bf16", "int8", "nf4")
    )
    visitor.finished()
    visitor.page.wait_for_selector("#differences-view section", state="attached")
    yield visitor
    visitor.leave()


def _serving(folder: Path) -> Iterator:
    started: list[Server] = []

    def start_one(**environment: str) -> Server:
        settings = {"COMPARATOR_DATA_DIR": str(folder / "data")} | environment
        started.append(start(folder, **settings))
        return started[-1]

    yield start_one
    for one in started:
        one.process.kill()
        one.process.wait(15)


@pytest.fixture
def serve(tmp_path) -> Iterator:
    """`serve(COMPARATOR_PUBLIC="1")` starts a server of its own, on `tmp_path / "data"`; ended with the test."""
    yield from _serving(tmp_path)


@pytest.fixture(scope="module")
def serve_file(tmp_path_factory) -> Iterator:
    """The same for all tests of a file."""
    yield from _serving(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="session")
def with_password(tmp_path_factory) -> Iterator[tuple[Server, Path]]:
    """A server that asks for a password, and its data folder."""
    folder = tmp_path_factory.mktemp("server")
    serving = _serving(folder)
    yield next(serving)(COMPARATOR_AUTH="ada:lovelace"), folder / "data"
    next(serving, None)


@pytest.fixture
def saved(server) -> Iterator:
    """The store of `server`, to put comparisons into and to look at what the page did."""
    from comparator.core.settings import get_settings
    from comparator.store import open_store

    get_settings.cache_clear()
    with open_store() as store:
        yield store
