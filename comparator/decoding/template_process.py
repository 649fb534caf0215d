"""The process that renders chat templates (`render_template.py`): started with the first one, reused, killed over a limit.

It gets none of this process's environment variables, and one conversation at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from comparator.util import streams

_PROGRAM = Path(__file__).with_name("render_template.py")


class TemplateProcess:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.child: subprocess.Popen | None = None

    def ask(self, line: bytes, seconds: float) -> bytes:
        """The answer to one request, a line of JSON; empty where the kernel ended the process. Raises `TimeoutError` after
        `seconds`, starting included."""
        end = time.monotonic() + seconds

        def check() -> None:
            if time.monotonic() > end:
                raise TimeoutError

        def exchange() -> bytes:
            try:
                child.stdin.write(line + b"\n")
                child.stdin.flush()
                return child.stdout.readline()
            except OSError:  # it ended while it was written to
                return b""

        with self._lock:
            answer = b""
            try:
                if self.child is None or self.child.poll() is not None:
                    self.child = _start()
                child = self.child
                answer = streams.wait(exchange, check, 0.05, "chat template")
            finally:
                if not answer:
                    self.close()
            return answer

    def close(self) -> None:
        child, self.child = self.child, None
        if child is not None:
            child.kill()
            child.wait()
            with contextlib.suppress(OSError):
                child.stdin.close()


def _start() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-I", "-S", str(_PROGRAM), *filter(None, sys.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in ("TZ", "SYSTEMROOT") if name in os.environ},
    )


def _forget() -> None:
    """In a forked process: the child belongs to the parent."""
    global process
    process = TemplateProcess()


process = TemplateProcess()
atexit.register(lambda: process.close())
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
