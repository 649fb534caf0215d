"""First come, first served: who has the device, and who waits. Knows nothing of what is done with it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator


class Turns:
    """First come, first served: one comparison at a time has the device."""

    def __init__(self):
        self._line: deque[object] = deque()
        self._doing: dict[object, Callable[[], str]] = {}
        self._changed = threading.Condition()

    @property
    def busy(self) -> bool:
        return bool(self._line)

    @property
    def waiting(self) -> int:
        return max(0, len(self._line) - 1)

    @property
    def doing(self) -> str:
        """What whoever has the device is doing, in words, for those who wait; "" where it did not say."""
        with self._changed:
            told = self._doing.get(self._line[0]) if self._line else None
        return told() if told else ""

    def enter(self, doing: Callable[[], str] | None = None) -> object:
        """Stand in line. `doing` is asked, from any thread, what is being done once it is this ticket's turn."""
        ticket = object()
        with self._changed:
            self._line.append(ticket)
            if doing:
                self._doing[ticket] = doing
        return ticket

    def ahead(self, ticket: object) -> int:
        with self._changed:
            return self._line.index(ticket)

    def wait(self, ticket: object, cancel: threading.Event) -> Iterator[int]:
        """Yield how many are ahead each time that changes, or what is being done does; end when it is this ticket's
        turn, or at Stop."""
        told: tuple[int, str] | None = None
        while not cancel.is_set():
            ahead = self.ahead(ticket)
            if ahead == 0:
                return
            now = (ahead, self.doing)
            if now != told:
                told = now
                yield ahead
            with self._changed:
                self._changed.wait(0.2)

    def leave(self, ticket: object) -> None:
        with self._changed:
            if ticket in self._line:
                self._line.remove(ticket)
            self._doing.pop(ticket, None)
            self._changed.notify_all()
