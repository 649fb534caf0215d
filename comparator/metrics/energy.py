"""Energy from NVML's counter, where the card has one: joules the whole card drew, idle draw included.

Knows nothing of models. Everything else (no NVML, an old card, a CPU) is None, not 0.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# The counter moves every 20 to 100 ms: over less than this a figure would be mostly the counter's own step.
SHORTEST_S = 0.5


@dataclass
class Used:
    """Filled when the `with` block ends. `joules` None: no counter."""

    joules: float | None = None
    start_s: float = 0.0
    end_s: float = 0.0

    def per_token(self, times_s: Sequence[float]) -> float | None:
        """Joules per decoded token: the card's mean power over the block × the time from the first token to the
        last, over the tokens after the first. None where nothing was metered or it was too short to tell.

        `times_s`: when each token reached the host, on the clock of `time.perf_counter`.
        """
        whole = self.end_s - self.start_s
        if self.joules is None or len(times_s) < 2 or whole < SHORTEST_S:
            return None
        power = self.joules / whole
        return power * (times_s[-1] - times_s[0]) / (len(times_s) - 1)


@contextlib.contextmanager
def metered(device: str) -> Iterator[Used]:
    """What the card draws while the block runs."""
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


_counters: dict[str, object] = {}


def _counter(device: str):
    """A function giving millijoules since the driver was loaded, or None. Asked once a device."""
    if device not in _counters:
        _counters[device] = _open(device)
    return _counters[device]


def _open(device: str):
    if not device.startswith("cuda"):
        return None
    try:
        import pynvml
        import torch

        pynvml.nvmlInit()
        # By UUID: CUDA_VISIBLE_DEVICES renumbers torch's devices and not NVML's.
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # no NVML, no counter on this card, or not allowed in this container
        return None

    def read():
        try:
            return pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError:
            return None

    return read
