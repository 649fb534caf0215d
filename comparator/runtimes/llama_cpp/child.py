"""The parent's end of a llama.cpp process: start it, ask it, end it, and say what became of it."""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import numpy as np

from comparator.core.errors import Stopped, UserError
from comparator.runtimes.llama_cpp.worker import PAGE, ROWS
from comparator.util import processes

_WAIT_S = 0.05  # how often Stop is looked at while a pass runs
# What the process gets of this one's environment: it reads strangers' files, and needs no keys.
_PASSED = ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV", "PYTHONPATH", "LD_LIBRARY_PATH", "SYSTEMROOT")
_PASSED_START = ("OMP_", "GOMP_", "KMP_", "GGML_", "CUDA_", "NVIDIA_", "LC_")
# OpenMP's threads wait for each other some 600 times per token. Where another process has a core, spinning for
# milliseconds, as libgomp does by default, starves the thread that is waited for (40 times as slow, measured); this
# is libgomp's own number for threads that outnumber the cores, some 30 µs.
_DEFAULTS = {"GOMP_SPINCOUNT": "1000"}
# What llama.cpp prints about a failed check is enough; it would start a debugger for a backtrace.
_ENVIRONMENT = {"GGML_NO_BACKTRACE": "1", "PYTHONIOENCODING": "utf-8"}


class Child:
    """One process of `worker.py`. Used on one thread."""

    def __init__(self, what: str):
        """`what`: the column's notation, for messages."""
        self.what, self.vocabulary = what, 0
        self._memory_file, self._errors = _anonymous_file(), tempfile.TemporaryFile()
        os.ftruncate(self._memory_file, PAGE)
        self._shared: mmap.mmap = mmap.mmap(self._memory_file, PAGE)
        self._pipe, theirs = Pipe()
        passed = {k: v for k, v in os.environ.items() if k in _PASSED or k.startswith(_PASSED_START)}
        environment = _DEFAULTS | passed | _ENVIRONMENT
        environment["PYTHONPATH"] = processes.python_path()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "comparator.runtimes.llama_cpp.worker", str(theirs.fileno()), str(self._memory_file)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._errors, env=environment,
            pass_fds=(theirs.fileno(), self._memory_file),
        )  # fmt: skip
        theirs.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, name: str, *arguments: Any, meanwhile: Callable[[], None] = lambda: None) -> Any:
        """What the method of `worker.Model` returns; `meanwhile` is called while it works, and may raise.

        Raises `UserError` for what llama.cpp refuses, and where the process has ended.
        """
        self._send(name, *arguments)
        return self._result(*self._receive(meanwhile))

    def open(
        self, file: Path, gpu: int | None, threads: int, meanwhile: Callable[[], None], cache: str = ""
    ) -> dict[str, Any]:
        """As `worker.Model.open`; `meanwhile` may raise `Stopped`."""
        facts = self.ask("open", str(file), gpu, threads, cache, meanwhile=meanwhile)
        self.vocabulary = facts["vocabulary"]
        self._shared = mmap.mmap(self._memory_file, PAGE + ROWS * 4 * self.vocabulary)
        return facts

    def feed(self, token_ids: Sequence[int], cancel: threading.Event, every: bool = False) -> int:
        """As `worker.Model.feed`. Raises `Stopped`."""
        rows = self.ask("feed", list(token_ids), every, meanwhile=self._abort_at(cancel))
        self._shared[0] = 0
        if not rows:
            raise Stopped
        return rows

    def greedy(
        self, token_ids: Sequence[int], count: int, ends: frozenset[int], width: int, cancel: threading.Event
    ) -> Generator[tuple[int, float], None, str]:
        """As `worker.Model.greedy`: yields (token, when it was chosen); returns why it ended."""
        self._send("greedy", list(token_ids), count, ends, width)
        abort, state = self._abort_at(cancel), "item"
        try:
            while True:
                abort()
                state, result = self._receive(abort)
                if state != "item":
                    return self._result(state, result)
                yield result
        finally:
            while state == "item" and self.alive:  # whoever asked does not want the rest
                self._shared[0] = 1
                state, _ = self._receive(lambda: None)
            self._shared[0] = 0

    @property
    def last_logits(self) -> np.ndarray:
        """(1, vocabulary) float32 after the token fed last. A view: the next pass changes it."""
        return np.frombuffer(self._shared, np.float32, self.vocabulary, PAGE).reshape(1, -1)

    def copy_logits(self, into: np.ndarray, first: int) -> None:
        """The rows from `first` on of the last pass's logits."""
        for start in range(0, len(into), ROWS):
            part = into[start : start + ROWS]
            self.ask("rows_to_share", first + start, len(part))
            part[:] = np.frombuffer(self._shared, np.float32, part.size, PAGE).reshape(part.shape)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait()
        self._pipe.close()
        for stream in (self.process.stdin, self._errors):
            with contextlib.suppress(OSError):
                stream.close()
        if self._memory_file >= 0:
            os.close(self._memory_file)
            self._memory_file = -1

    def _send(self, *message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError:
            raise self._ended() from None

    def _receive(self, meanwhile: Callable[[], None]) -> tuple[str, Any]:
        try:
            while not self._pipe.poll(_WAIT_S):
                meanwhile()
            return self._pipe.recv()
        except (EOFError, OSError):
            raise self._ended() from None

    def _result(self, state: str, result: Any) -> Any:
        if state == "failed":
            raise UserError(f"llama.cpp cannot run {self.what}: {result}.", "Try another file of this model.")
        return result

    def _abort_at(self, cancel: threading.Event) -> Callable[[], None]:
        def abort() -> None:
            if cancel.is_set():
                self._shared[0] = 1

        return abort

    def _ended(self) -> UserError:
        """What became of the process, with the last line that it printed."""
        code = self.process.wait()
        how = f"with exit code {code}"
        if code < 0:
            with contextlib.suppress(ValueError):
                how = f"by signal {signal.Signals(-code).name}"
        self._errors.seek(0)
        lines = [
            line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()
        ]
        because = f": {lines[-1][:300]}" if lines else ""
        return UserError(
            f"The llama.cpp process of {self.what} ended {how}{because}.",
            "The most likely cause is a lack of memory: unload other variants, or choose a smaller file. The next run "
            "restarts it."
            if code == -signal.SIGKILL
            else "The other variants are not affected; the next run restarts it.",
        )


def _anonymous_file() -> int:
    """A file in memory, where the system has such; else a deleted one."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("llama-cpp-logits")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
