"""Looking at the processes of a cluster on this machine."""

from __future__ import annotations

import contextlib
import time

import psutil


def actors() -> list[int]:
    """Processes of actors of ours on the nodes that this process started; another one may test its own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if " ".join(process.cmdline()).startswith("ray::EngineActor"):
                found.append(process.pid)
    return found


def wait_until(true, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.1)
    return bool(true())
