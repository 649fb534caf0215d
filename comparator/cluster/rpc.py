"""Serves an engine's methods to another process: calls by ticket, answers in batches, stop by ticket.

Batches are sent over a Ray generator or a socket to a child process. Answers are the tuples of arguments that a method
passes to its callback, and last `Returned` or `Raised`. Everything emitted while a batch is being sent goes into the next
one, so a slow connection never delays decoding.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from comparator.core.errors import Stopped, UserError
from comparator.core.events import Chunk
from comparator.util.streams import Background


@dataclass(frozen=True)
class Call:
    """A call of an engine's method.

    Attributes:
        cancellable: whether the method takes `cancel`.
        callback: the name of the parameter whose calls are sent back; None where it takes none.
    """

    name: str
    arguments: tuple = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    cancellable: bool = False
    callback: str | None = None
    ticket: str = field(default_factory=lambda: secrets.token_hex(8))


@dataclass(frozen=True)
class Raised:
    """The method raised `error`, a `UserError` or `Stopped`, which pickle."""

    error: Exception


@dataclass(frozen=True)
class Returned:
    """The method returned `value`."""

    value: Any


class Host:
    """Runs methods of `engine`, one thread per call. `interval_s`: minimum time between two batches."""

    def __init__(self, engine: Any, interval_s: float = 0.0):
        self.engine, self.interval_s = engine, interval_s
        self._running: dict[str, threading.Event] = {}
        self._stopped: set[str] = set()  # tickets stopped before their call arrived
        self._lock = threading.Lock()

    def stop(self, ticket: str) -> None:
        """Stop the call of this ticket; its batches continue until it has ended."""
        with self._lock:
            if ticket in self._running:
                self._running[ticket].set()
            else:
                self._stopped.add(ticket)

    def serve(self, call: Call) -> Iterator[list]:
        """Batches of what the method emits, the last one with `Returned` or `Raised`."""
        cancel = threading.Event()
        with self._lock:
            self._running[call.ticket] = cancel
            if call.ticket in self._stopped:
                self._stopped.discard(call.ticket)
                cancel.set()
        background = Background(lambda emit: self._answer(call, cancel, emit))
        try:
            last_s = 0.0
            for item in background:
                time.sleep(max(0.0, last_s + self.interval_s - time.monotonic()))
                last_s = time.monotonic()
                yield merged([item, *background.drain()])
            yield [background.future.result()]
        finally:
            cancel.set()
            background.future.result()
            with self._lock:
                del self._running[call.ticket]

    def _answer(self, call: Call, cancel: threading.Event, emit: Callable[..., None]) -> Returned | Raised:
        keywords = dict(call.keywords)
        if call.cancellable:
            keywords["cancel"] = cancel
        if call.callback:
            keywords[call.callback] = emit
        try:
            return Returned(getattr(self.engine, call.name)(*call.arguments, **keywords))
        except (UserError, Stopped) as error:
            return Raised(error)
        except BaseException as error:
            from comparator.engine.explain import explain
            from comparator.util import error_log

            problem = explain(error, call.name)
            error_log.release(error)
            return Raised(problem)


def receive(items: Iterator[Any], callback: Callable[..., None], cancel: threading.Event | None) -> Any:
    """Pass emitted tuples to `callback`; return the method's result, or raise its error.

    An error in `callback` sets `cancel`, and is raised once the work has ended. `items` must forward `cancel` to the other
    process.
    """
    outcome: Returned | Raised | None = None
    for item in items:
        if isinstance(item, (Returned, Raised)):
            outcome = item
            continue
        try:
            callback(*item)
        except BaseException:
            if cancel is not None:
                cancel.set()
            with contextlib.suppress(Exception):  # of the connection: the error below came first
                for _ in items:
                    pass
            raise
    if isinstance(outcome, Raised):
        raise outcome.error
    return outcome.value


def merged(items: list[tuple]) -> list[tuple]:
    """The items, with consecutive `Chunk`s joined."""
    result: list[tuple] = []
    for item in items:
        if result and isinstance(item[0], Chunk) and isinstance(result[-1][0], Chunk):
            (last,), (chunk,) = result[-1], item
            result[-1] = (
                Chunk(last.text + chunk.text, last.token_ids + chunk.token_ids, last.times_s + chunk.times_s),
            )
        else:
            result.append(item)
    return result
