"""Looking at the processes of a cluster on this machine."""

from __future__ import annotations

import time

import psutil


def actors() -> list[int]:
    """Processes of actors of ours on this machine."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = " ".join(process.info["cmdline"] or [])
        if line.startswith("ray::EngineActor"):
            found.append(process.pid)
    return found


def wait_until(true, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():
            return True
        time.sleep(0.1)
    return bool(true())
