"""How often a visitor may ask, and all visitors together.

limiter = RateLimiter(limits)
limiter.admit(visitor(headers, client_host, settings))
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque

from comparator.core.errors import UserError
from comparator.deploy.limits import Limits

_MOST_VISITORS = 10_000


class RateLimiter:
    """Limits requests in a moving window of one minute, per visitor and overall. Safe from any thread.

    A few visitors who take as much as they may would leave nothing for the others. So beyond the overall limit whoever
    has had less than an equal share of it is still admitted, up to twice the limit.
    """

    def __init__(self, limits: Limits):
        from limits import RateLimitItemPerMinute
        from limits.storage import MemoryStorage
        from limits.strategies import MovingWindowRateLimiter

        each, total = limits.requests_per_minute, limits.requests_per_minute_total
        self._each = RateLimitItemPerMinute(each, namespace="visitor") if each is not None else None
        self._total = RateLimitItemPerMinute(total, namespace="total") if total is not None else None
        self._recent: deque[tuple[float, str]] = deque()  # when and whose, in the last minute
        self._storage = MemoryStorage()
        self._windows = MovingWindowRateLimiter(self._storage)
        self._lock = threading.Lock()  # a request counts in both windows or in neither

    def admit(self, visitor: str) -> None:
        """Count one request, or raise `UserError` with the seconds until the next is allowed; refusals do not count."""
        with self._lock:
            if self._each and not self._windows.test(self._each, visitor):
                most = self._each.amount
                raise UserError(
                    f"You have started {most} comparisons in the last minute; the limit here is {most} "
                    "(COMPARATOR_REQUESTS_PER_MINUTE).",
                    f"Try again in {self._wait_s(self._each, visitor)} s.",
                )
            if self._total and not self._windows.test(self._total) and not self._is_below_share(visitor):
                most = self._total.amount
                raise UserError(
                    f"This server has started {most} comparisons for all visitors together in the last minute; its limit "
                    f"is {most} (COMPARATOR_REQUESTS_PER_MINUTE_TOTAL).",
                    f"Try again in {self._wait_s(self._total)} s, or run Quant Comparator on your own machine.",
                )
            if self._each:
                self._windows.hit(self._each, visitor)
            if self._total:
                self._windows.hit(self._total)
                self._recent.append((time.time(), visitor))
            self._prune()

    def _is_below_share(self, visitor: str) -> bool:
        while self._recent and time.time() - self._recent[0][0] > 60:
            self._recent.popleft()
        if self._each is None or len(self._recent) >= 2 * self._total.amount:
            return False
        counts = Counter(who for _, who in self._recent)
        return counts[visitor] < max(1, self._total.amount // len({*counts, visitor}))

    def _wait_s(self, item, *key: str) -> int:
        return max(1, math.ceil(self._windows.get_window_stats(item, *key).reset_time - time.time()))

    def _prune(self) -> None:
        """`MemoryStorage` keeps every key that it ever saw: beyond `_MOST_VISITORS`, drop the longest idle half."""
        events = self._storage.events
        if len(events) <= _MOST_VISITORS:
            return
        latest = {key: hits[0].atime if hits else 0.0 for key, hits in list(events.items())}
        for key in sorted(latest, key=latest.get)[: -_MOST_VISITORS // 2]:
            with self._storage.locks[key]:  # its own thread empties expired keys
                self._storage.clear(key)
