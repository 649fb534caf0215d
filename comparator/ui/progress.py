"""Following work in the background from an event of the page."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from comparator.core.errors import Stopped, UserError
from comparator.ui.results.notice import problem, say
from comparator.util.streams import Background

# Seconds between two looks at what is running. Rendering takes time from the decoding beside it, so a small machine is
# looked at less often.
TICK_S = 0.1 if (os.cpu_count() or 1) > 4 else 0.2
PULSE_S = 1.0  # seconds between updates when nothing changed; sending one is how a closed tab is noticed


async def batches(background: Background, stop: threading.Event) -> AsyncIterator[list[tuple]]:
    """What the work emits, a batch at a time, until it has ended. An empty batch comes when `stop` is set, and every second."""
    stopping, sent_at = False, time.monotonic()
    while True:
        ended = background.ended  # checked before draining, so that nothing is lost
        emitted = background.drain()
        if emitted or stop.is_set() != stopping or time.monotonic() - sent_at > PULSE_S:
            stopping, sent_at = stop.is_set(), time.monotonic()
            yield emitted
        if ended:
            return
        await asyncio.sleep(TICK_S)


def running_line(fraction: float | None, message: str) -> str:
    """The status line of work that goes on, or is queued ("2 ahead")."""
    if message.endswith(" ahead"):
        return say(f"Queued: {message}. It starts automatically.")
    return say(message, f"{fraction * 100:.0f} %" if fraction is not None else "")


def broken_off(error: BaseException | None, what: str, button: str) -> str:
    """Why `what` has no result: stopped, a user error, or a defect. button: starts it again."""
    if error is None or isinstance(error, Stopped):
        return say("Stopped.")
    if isinstance(error, UserError):
        return problem(error)
    return problem(
        UserError(
            f"{what} failed: {type(error).__name__}: {error}".strip(),
            f"Press {button} to try again. If it happens again, please report this message.",
        )
    )


def run_buttons(running: bool) -> list[Any]:
    """(the button that starts, the button that stops)."""
    return [gr.Button(interactive=not running), gr.Button(interactive=running)]
