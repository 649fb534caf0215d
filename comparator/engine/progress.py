"""Progress messages of the engine's work: not faster than a page can show them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from comparator.core.errors import Stopped
from comparator.engine.protocol import OnProgress

Emit = Callable[[Any], None]
PROGRESS_S = 0.1  # how often the same progress message is repeated, at most


def throttled(on_progress: Emit, cancel: threading.Event) -> OnProgress:
    """`on_progress`, called when the message changes or after `PROGRESS_S`. Raises `Stopped` at Stop."""
    last_s, last_message = 0.0, ""

    def report(fraction: float | None, message: str) -> None:
        nonlocal last_s, last_message
        if cancel.is_set():
            raise Stopped
        now_s = time.monotonic()
        if message != last_message or fraction == 1 or now_s - last_s > PROGRESS_S:
            last_s, last_message = now_s, message
            on_progress(fraction, message)

    return report
