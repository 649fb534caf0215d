"""Progress on stderr: a status line that changes in place on a terminal, plain lines in a log."""

from __future__ import annotations

import io

import pytest

from comparator.cli.progress import Progress
from comparator.core.events import Chunk, Failed, Generating, Loading, Queued
from comparator.core.result import CellResult
from comparator.core.variant import Cell, Variant

CELL = Cell(Variant("bf16"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "40")
    return Terminal()


def events() -> list:
    loading = [Loading(CELL, fraction, "reading [bold]weights (3 s)") for fraction in (0.25, 0.5, 0.5)]
    return [*loading, Generating(CELL, Chunk("Paris", (1,), (0.0,))), Queued(1, "training")]


def test_a_log_has_a_line_for_each_new_state():
    stream = io.StringIO()
    with Progress(stream) as progress:
        for event in events():
            progress(event)
    assert stream.getvalue().splitlines() == [
        "bf16: reading [bold]weights", "── bf16", "Paris", "queued, 1 run ahead",
    ]  # fmt: skip


def test_silent_says_only_what_failed():
    stream = io.StringIO()
    with Progress(stream, silent=True) as progress:
        for event in events():
            progress(event)
        progress.report(0.5, "working")
        progress.remark("Making a checkpoint.")
        progress(Failed(CELL, "No room.", "Unload nf4.", CellResult("bf16", status="failed")))
    assert stream.getvalue() == "bf16 failed: No room. Unload nf4.\n"


def test_a_terminal_shows_the_state_in_place_and_is_left_clean(terminal):
    with Progress(terminal) as progress:
        for event in events():
            progress(event)
    shown = terminal.getvalue()
    assert (shown.count("25%"), shown.count("50%")) == (1, 2), (
        "a state is drawn when it changes and when it goes"
    )
    assert "[bold]" in shown, "a message is read as rich's markup"
    assert "── bf16\nParis\n" in shown and "training" in shown
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h"), "the cursor stays hidden"
    assert shown.endswith("\x1b[2K"), "the status line is left behind"
