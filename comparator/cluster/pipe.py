"""The driver as a child process, and the line to it: `multiprocessing`'s connection, pickled dataclasses.

Ray ends the process that is connected to a cluster whose head is gone; that shall be the child, not the page. The child
ends when the line does, so that the actors, which belong to it, end with the app, however the app ended.
"""

from __future__ import annotations

import contextlib
import os
import queue
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from comparator.hosting import Raised, Returned
from comparator.settings import Settings

STOP_S = 0.1  # how soon Stop is noticed while nothing comes
STOP: list = ["stop"]


class Gone(Exception):
    """The child has ended; `said` is the last it wrote."""

    def __init__(self, said: str = ""):
        super().__init__(said)
        self.said = said


class Line:
    """The app's end. Safe from any thread. `on_state` is told each new `EngineState`, before what caused it is
    answered."""

    def __init__(self, settings: Settings, on_state: Callable[[Any], None]):
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "comparator.cluster.driver", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(),
                cwd=os.sep,  # Ray hands this folder to every actor as a place to import from: they shall use their own
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C is for the app, which lets the columns end
            )
        self._socket, self._connection = ours, Connection(os.dup(ours.fileno()))
        self._sending = threading.Lock()
        self._waiting: dict[str, queue.SimpleQueue] = {}
        self._on_state = on_state
        self.alive = True
        self._send(settings)
        threading.Thread(target=self._read, name="cluster", daemon=True).start()

    def _send(self, message: Any) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            raise Gone(self._said()) from None

    def _read(self) -> None:
        try:
            while True:
                ticket, items = self._connection.recv()
                if ticket is None:
                    self._on_state(items)
                elif ticket in self._waiting:
                    self._waiting[ticket].put(items)
        except (OSError, EOFError):
            self.alive = False
            for waiting in list(self._waiting.values()):
                waiting.put(None)

    def stream(
        self, name: str, *arguments: Any, cancel: threading.Event | None = None, **named: Any
    ) -> Iterator[Any]:
        """What a method of the driver's `Conductor` yields, or what it returns. `cancel` is passed on as Stop. Raises
        what it raises, and `Gone`."""
        ticket, answers = secrets.token_hex(8), queue.SimpleQueue()
        self._waiting[ticket] = answers
        over = asked = False
        try:
            self._send((ticket, name, arguments, named, cancel is not None))
            while not over:
                batch = self._next(answers, None if asked else cancel)
                if cancel is not None and cancel.is_set() and not asked:
                    asked = True
                    self._send((ticket, None, (), {}, False))
                if batch is STOP:
                    continue
                for item in batch:
                    if isinstance(item, Raised):
                        raise item.error
                    yield item.value if isinstance(item, Returned) else item
                over = batch == []
        except GeneratorExit:
            if cancel is not None:
                cancel.set()
            with contextlib.suppress(Gone):  # wait until the work has really ended
                self._send((ticket, None, (), {}, False))
                while self._next(answers, None):
                    pass
            raise
        finally:
            del self._waiting[ticket]

    def _next(self, answers: queue.SimpleQueue, cancel: threading.Event | None) -> Any:
        while True:
            try:
                found = answers.get(timeout=STOP_S)
            except queue.Empty:
                if cancel is not None and cancel.is_set():
                    return STOP
                if not self.alive and answers.empty():
                    raise Gone(self._said()) from None
                continue
            if found is None:
                raise Gone(self._said())
            return found

    def _said(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
            return self._log.read().decode("utf-8", "replace")
        return ""

    def close(self) -> None:
        """End the child, and with it its actors."""
        self.alive = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes whoever reads, here and there
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._socket.close()


def _environment() -> dict[str, str]:
    """So that the child finds this very package, whatever folder the app was started in."""
    import comparator

    folder = str(Path(comparator.__file__).parent.parent)
    paths = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "CUDA_VISIBLE_DEVICES": ""}
