"""A process that answers lines of JSON, one at a time: started with the first question, reused, killed over a limit.

For what strangers decide, over and over: a question that hangs, swells or crashes it costs that one answer, and the next
one gets a new process.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import threading
import time
import weakref
from collections.abc import Callable

from comparator.util import streams

MOST_BYTES = 64_000_000  # of an answer
_OUT_OF_CPU = -signal.SIGXCPU if hasattr(signal, "SIGXCPU") else None  # returncode at the soft RLIMIT_CPU
_ALL: weakref.WeakSet[LineProcess] = weakref.WeakSet()


class LineProcess:
    """Thread-safe. `start` starts the process, with pipes as its stdin and stdout; it ends with its stdin."""

    def __init__(self, start: Callable[[], subprocess.Popen], name: str):
        self._start, self._name = start, name
        self._lock = threading.Lock()
        self.child: subprocess.Popen | None = None
        _ALL.add(self)

    def ask(self, line: bytes, seconds: float, meanwhile: Callable[[], None] = lambda: None) -> bytes:
        """The answer to one question, a line of JSON; empty where the process ended or the answer is over `MOST_BYTES`.

        Raises `TimeoutError` after `seconds` of its own, starting included, or where the process ended at its limit of CPU
        time, and what `meanwhile` raises, which is called all the time.
        """

        def check() -> None:
            meanwhile()
            if time.monotonic() > end:
                raise TimeoutError

        def exchange() -> bytes:
            try:
                child.stdin.write(line + b"\n")
                child.stdin.flush()
                answer = child.stdout.readline(MOST_BYTES)
            except OSError:  # it ended while it was written to
                return b""
            return answer if answer.endswith(b"\n") else b""

        while not self._lock.acquire(timeout=0.1):  # others' questions are answered first
            meanwhile()
        try:
            end, answer, child = time.monotonic() + seconds, b"", None
            try:
                if self.child is None or self.child.poll() is not None:
                    self.child = self._start()
                child = self.child
                answer = streams.wait(exchange, check, 0.05, self._name)
            finally:
                if not answer:
                    self.close()
            if not answer and child.returncode == _OUT_OF_CPU:
                raise TimeoutError
            return answer
        finally:
            self._lock.release()

    def close(self) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.kill()
            child.wait()
            with contextlib.suppress(OSError):
                child.stdin.close()

    def _forget(self) -> None:
        """In a forked process: the child belongs to the parent."""
        self._lock, self.child = threading.Lock(), None


def _close_all() -> None:
    for process in list(_ALL):
        process.close()


def _forget_all() -> None:
    for process in list(_ALL):
        process._forget()


atexit.register(_close_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
