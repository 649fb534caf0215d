"""Serving an engine's methods to somebody in another process: answers in batches, Stop by ticket.

What carries the batches (a Ray generator, a pipe to a child process) is not known here. Items are what the engine
yields; tokens that came meanwhile travel together, so that a slow carrier never holds the decoding up.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from comparator.types import Chunk, Problem, Stopped


@dataclass(frozen=True)
class Raised:
    """How the work ended, where it did not end well. `error` is a `Problem` or `Stopped`, which pickle."""

    error: Exception


@dataclass(frozen=True)
class Returned:
    """What a plain call gave."""

    value: Any


class Host:
    """Runs methods of `engine`, each on a thread of its own. `interval_s`: at least so long between two batches."""

    def __init__(self, engine: Any, interval_s: float = 0.0):
        self.engine, self.interval_s = engine, interval_s
        self._running: dict[str, threading.Event] = {}
        self._stopped: set[str] = set()  # Stop may overtake the work it is for
        self._lock = threading.Lock()

    def stop(self, ticket: str) -> None:
        """Ask the work of this ticket to end; its batches go on until it has."""
        with self._lock:
            if ticket in self._running:
                self._running[ticket].set()
            else:
                self._stopped.add(ticket)

    def serve(
        self, ticket: str, name: str, arguments: tuple, named: dict[str, Any], stoppable: bool
    ) -> Iterator[list]:
        """Lists of what `engine.name(*arguments, **named)` yields, or one with `Returned`; `Raised` last where it
        raised. `stoppable`: it takes `cancel`."""
        cancel, items = threading.Event(), queue.SimpleQueue()
        with self._lock:
            self._running[ticket] = cancel
            if ticket in self._stopped:
                self._stopped.discard(ticket)
                cancel.set()

        def work() -> None:
            try:
                given = {**named, "cancel": cancel} if stoppable else named
                found = getattr(self.engine, name)(*arguments, **given)
                if stoppable:
                    for item in found:
                        items.put(item)
                else:
                    items.put(Returned(found))
            except (Problem, Stopped) as error:
                items.put(Raised(error))
            except BaseException as error:
                from comparator.errors import explain

                items.put(Raised(explain(error, name)))
            items.put(None)

        thread = threading.Thread(target=work, name=f"serving {name}", daemon=True)
        thread.start()
        try:
            yield from self._batches(items)
        finally:
            cancel.set()
            thread.join()
            with self._lock:
                del self._running[ticket]

    def _batches(self, items: queue.SimpleQueue) -> Iterator[list]:
        last, over = 0.0, False
        while not over:
            batch = [items.get()]
            wait_s = last + self.interval_s - time.monotonic()
            if wait_s > 0 and batch[0] is not None:
                time.sleep(wait_s)
            while not items.empty():
                batch.append(items.get())
            last = time.monotonic()
            over = batch[-1] is None
            if found := merged(batch[:-1] if over else batch):
                yield found


def merged(items: list) -> list:
    """The same items with neighbouring chunks of tokens made one."""
    found: list = []
    for item in items:
        if isinstance(item, Chunk) and found and isinstance(found[-1], Chunk):
            last = found[-1]
            found[-1] = Chunk(
                last.text + item.text, last.token_ids + item.token_ids, last.times_s + item.times_s
            )
        else:
            found.append(item)
    return found
