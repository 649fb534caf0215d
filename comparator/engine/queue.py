"""Who has the device and who is queued: visitors take turns, and one visitor's requests come in their order.

Each request is of a round: the one that is being served, or the one after the visitor's last request that is still
queued. Rounds are served in order. So whoever queues five requests waits behind each other's first, and nobody who
came later in a round overtakes one of an earlier one.
"""

from __future__ import annotations

import contextlib
import threading
from bisect import insort
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass

from comparator.core.errors import Stopped

OnWait = Callable[[int, str], None]  # how many are ahead, and what is being done meanwhile

_visitor: ContextVar[str] = ContextVar("visitor", default="")  # "": the person at this machine


@contextlib.contextmanager
def asked_by(visitor: str) -> Iterator[None]:
    """Turns that are taken inside are this visitor's. Threads started inside with `streams` inherit it."""
    token = _visitor.set(visitor)
    try:
        yield
    finally:
        _visitor.reset(token)


@dataclass(eq=False)
class _Entry:
    describe: Callable[[], str] | None
    visitor: str
    round: int


class FairQueue:
    """One request at a time has the engine. Safe from any thread."""

    def __init__(self):
        self._entries: list[
            _Entry
        ] = []  # the first has the device, the others are in the order of their turns
        self._changed = threading.Condition()

    @property
    def busy(self) -> bool:
        return bool(self._entries)

    @property
    def waiting(self) -> int:
        return max(0, len(self._entries) - 1)

    def of(self, visitor: str) -> int:
        """How many requests of this visitor are served or queued."""
        with self._changed:
            return sum(e.visitor == visitor for e in self._entries)

    @property
    def doing(self) -> str:
        """What is being done, for those who are queued; "" where it is not described."""
        with self._changed:
            describe = self._entries[0].describe if self._entries else None
        return describe() if describe else ""

    @contextlib.contextmanager
    def turn(
        self,
        cancel: threading.Event,
        on_wait: OnWait = lambda ahead, doing: None,
        describe: Callable[[], str] | None = None,
    ) -> Iterator[None]:
        """Inside, the caller has the engine to itself. Raises `Stopped` where Stop comes first.

        Args:
            on_wait: called each time the number of requests ahead, or what is being done, changes.
            describe: says what is being done; called from any thread while the caller has the engine.
        """
        with self._changed:
            entry = self._enqueue(describe, _visitor.get())
        try:
            self._wait(entry, cancel, on_wait)
            yield
        finally:
            with self._changed:
                self._entries.remove(entry)
                self._changed.notify_all()

    def _enqueue(self, describe: Callable[[], str] | None, visitor: str) -> _Entry:
        if not self._entries:
            self._entries.append(_Entry(describe, visitor, 0))
            return self._entries[0]
        last = max((e.round for e in self._entries if e.visitor == visitor), default=None)
        entry = _Entry(describe, visitor, self._entries[0].round if last is None else last + 1)
        insort(self._entries, entry, lo=1, key=lambda e: e.round)  # behind all of the same round
        return entry

    def _wait(self, entry: _Entry, cancel: threading.Event, on_wait: OnWait) -> None:
        reported: tuple[int, str] | None = None
        while True:
            if cancel.is_set():
                raise Stopped
            with self._changed:
                ahead = self._entries.index(entry)
            if ahead == 0:
                return
            status = (ahead, self.doing)
            if status != reported:
                reported = status
                on_wait(*status)
            with self._changed:
                self._changed.wait(0.2)
