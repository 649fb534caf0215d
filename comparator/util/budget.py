"""How much of something may be had within a moving time."""

from __future__ import annotations

import threading
import time
from collections import deque


class Budget:
    """At most `most` in any `seconds`; the first one is always let through. Thread-safe."""

    def __init__(self, most: float, seconds: float):
        self.most, self.seconds = most, seconds
        self._taken: deque[tuple[float, float]] = deque()
        self._lock = threading.Lock()

    def take(self, amount: float) -> bool:
        """Whether so much may be had now; then it counts."""
        now_s = time.monotonic()
        with self._lock:
            while self._taken and now_s - self._taken[0][0] > self.seconds:
                self._taken.popleft()
            if self._taken and sum(taken for _, taken in self._taken) + amount > self.most:
                return False
            self._taken.append((now_s, amount))
            return True
