"""Who has the device and who is queued: first come, first served."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from comparator.core.errors import Stopped

OnWait = Callable[[int, str], None]  # how many are ahead, and what is being done meanwhile


@dataclass(eq=False)
class _Entry:
    describe: Callable[[], str] | None


class FairQueue:
    """One request at a time has the engine. Safe from any thread."""

    def __init__(self):
        self._entries: deque[_Entry] = deque()
        self._changed = threading.Condition()

    @property
    def busy(self) -> bool:
        return bool(self._entries)

    @property
    def waiting(self) -> int:
        return max(0, len(self._entries) - 1)

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
        entry = _Entry(describe)
        with self._changed:
            self._entries.append(entry)
        try:
            self._wait(entry, cancel, on_wait)
            yield
        finally:
            with self._changed:
                self._entries.remove(entry)
                self._changed.notify_all()

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
