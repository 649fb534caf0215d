"""How long quantizing takes: estimated from a trial at first, then from what the layers really took."""

from __future__ import annotations

import time
from collections.abc import Callable

Progress = Callable[[float | None, str], None]


class TimeLeft:
    """Turns finished work into a fraction and the time left: first from a trial, then from what it really took."""

    def __init__(self, total: float, progress: Progress, blocks: int):
        self.total, self.progress, self.blocks = total, progress, blocks
        self.done, self.start_s, self.guess_s = 0.0, time.perf_counter(), 0.0
        self.message = ""

    def guess(self, seconds_a_unit: float, passes_s: float) -> None:
        """What the trial says the whole will take."""
        self.guess_s = seconds_a_unit * self.total + passes_s
        self.progress(0.0, f"quantizing {self.blocks} layers, roughly {spoken(self.guess_s)[6:]}")
        self.start_s = time.perf_counter()

    def enter(self, number: int) -> None:
        spent_s, share = time.perf_counter() - self.start_s, self.done / self.total
        # The trial weighs as much as two layers' worth of the real thing.
        trust = min(1.0, number / (number + 2)) if number else 0.0
        measured_s = spent_s * (1 - share) / share if share else 0.0
        left_s = trust * measured_s + (1 - trust) * self.guess_s * (1 - share)
        self.message = f"quantizing layer {number + 1} of {self.blocks}, {spoken(left_s)} left"
        self.report()

    def report(self) -> None:
        self.progress(self.done / self.total, self.message)

    def finished(self, work: float) -> None:
        self.done += work


def spoken(seconds: float) -> str:
    """`about 5 min`, `about 40 s`."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {max(1, round(seconds))} s"
