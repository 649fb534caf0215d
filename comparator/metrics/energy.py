"""Energy from NVML's counter: joules of the whole card, idle power included. None without NVML or a counter."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from comparator.metrics import nvml

# The counter is updated every 20 to 100 ms, so a shorter measurement would be too coarse.
SHORTEST_S = 0.5


@dataclass
class Used:
    """Filled when the `with` block ends. `joules` None: no counter."""

    joules: float | None = None
    start_s: float = 0.0
    end_s: float = 0.0

    def per_token(self, times_s: Sequence[float]) -> float | None:
        """Joules per decoded token: the card's mean power over the block × the time from the first token to the
        last, over the tokens after the first. None if there is no counter or the block was shorter than `SHORTEST_S`.

        `times_s`: when each token reached the host, on the clock of `time.perf_counter`.
        """
        duration_s = self.end_s - self.start_s
        if self.joules is None or len(times_s) < 2 or duration_s < SHORTEST_S:
            return None
        watts = self.joules / duration_s
        return watts * (times_s[-1] - times_s[0]) / (len(times_s) - 1)


@contextlib.contextmanager
def metered(device: str) -> Iterator[Used]:
    """Measures the card's energy while the block runs."""
    counter = _counter(device)
    used = Used(start_s=time.perf_counter())
    before = counter() if counter else None
    try:
        yield used
    finally:
        if counter and before is not None:
            after = counter()
            used.joules = (after - before) / 1000 if after is not None else None
        used.end_s = time.perf_counter()


def _counter(device: str) -> Callable[[], int | None] | None:
    """A function giving millijoules since the driver was loaded, or None where the card has no counter."""
    handle = nvml.handle(device)

    def read() -> int | None:
        import pynvml

        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError:
            return None

    return read if handle is not None and read() is not None else None
