"""One thread that does all of the engine's work, one piece after another.

PyTorch's thread pools belong to the thread that started them: called from changing threads, the same decode
loop ran at half its speed on two cores.
"""

from __future__ import annotations

import contextvars
import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from comparator.util import streams


class Worker:
    """Safe to use from any thread but its own, which would wait for itself."""

    def __init__(self, name: str = "engine"):
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    def submit(self, work: Callable[[], Any]) -> Future:
        """Starts `work` there, with the caller's context variables."""
        return self._thread.submit(contextvars.copy_context().run, work)

    def call(self, work: Callable[[], Any]) -> Any:
        """Run `work` there and wait for what it returns."""
        return self.submit(work).result()

    def follow(
        self, work: Callable[[streams.Emit], Any], callback: Callable[..., None], cancel: threading.Event
    ) -> Any:
        """Run `work(emit)` there; what it emits is passed to `callback` on the calling thread, beside the work and not
        between its steps. Returns what `work` returns. An error in `callback` sets `cancel` and waits for the work."""
        return streams.follow(work, callback, cancel, self.submit)


@cache
def freeze_imports() -> None:
    """Once per process: what was imported stays, and searching it for garbage took a third of a second per unload. Not for
    each engine, since models of another one would never be freed then."""
    gc.freeze()
