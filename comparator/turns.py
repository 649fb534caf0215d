"""First come, first served: who has the device, and who waits. Knows nothing of what is done with it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator


class Turns:
    """First come, first served: one comparison at a time has the device."""

    def __init__(self):
        self._line: deque[object] = deque()
        self._changed = threading.Condition()

    @property
    def busy(self) -> bool:
        return bool(self._line)

    @property
    def waiting(self) -> int:
        return max(0, len(self._line) - 1)

    def enter(self) -> object:
        ticket = object()
        with self._changed:
            self._line.append(ticket)
        return ticket

    def ahead(self, ticket: object) -> int:
        with self._changed:
            return self._line.index(ticket)

    def wait(self, ticket: object, cancel: threading.Event) -> Iterator[int]:
        """Yield how many are ahead each time that changes; end when it is this ticket's turn, or at Stop."""
        told = None
        while not cancel.is_set():
            ahead = self.ahead(ticket)
            if ahead == 0:
                return
            if ahead != told:
                told = ahead
                yield ahead
            with self._changed:
                self._changed.wait(0.2)

    def leave(self, ticket: object) -> None:
        with self._changed:
            if ticket in self._line:
                self._line.remove(ticket)
            self._changed.notify_all()
