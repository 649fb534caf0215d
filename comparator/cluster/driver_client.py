"""The driver as a child process, and the connection to it: `multiprocessing`'s, with pickled dataclasses.

Ray ends the connected process when the cluster's head is lost; that must be the child, not the page. The child ends when
the connection does, and with it its actors, so that none outlives the app, however that ended.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from comparator.cluster.rpc import Call, Raised, Returned, receive
from comparator.core.settings import Settings
from comparator.engine.protocol import ignore

STOP_S = 0.1  # interval at which `cancel` is checked while no answer arrives


class Gone(Exception):
    """The child process has ended; the argument is the end of its output."""


class DriverConnection:
    """The app's end of the connection. Thread-safe. `on_state` is called with each new `EngineState`, before the call
    that changed it returns."""

    def __init__(self, settings: Settings, on_state: Callable[[Any], None]):
        ours, theirs = socket.socketpair()
        self._log = tempfile.TemporaryFile()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "comparator.cluster.driver", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=_environment(),
                cwd=os.sep,  # Ray adds this folder to every actor's import path; they must use their own
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                start_new_session=True,  # Ctrl-C must reach the app only, which stops the columns
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
            raise Gone(self._log_tail()) from None

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

    def call(
        self, call: Call, cancel: threading.Event | None = None, callback: Callable[..., None] = ignore
    ) -> Any:
        """Call a method of the driver's `ClusterScheduler` and return its result; setting `cancel` stops it. Raises the
        method's errors, and `Gone`."""
        answers: queue.SimpleQueue = queue.SimpleQueue()
        self._waiting[call.ticket] = answers
        try:
            self._send(call)
            return receive(self._items(call, answers, cancel), callback, cancel)
        finally:
            del self._waiting[call.ticket]

    def _items(self, call: Call, answers: queue.SimpleQueue, cancel: threading.Event | None) -> Iterator[Any]:
        """The answers, one by one. Sends the ticket once, which stops the call, when `cancel` is set."""
        stopped = False
        while True:
            if cancel is not None and cancel.is_set() and not stopped:
                stopped = True
                self._send(call.ticket)
            try:
                batch = answers.get(timeout=STOP_S)
            except queue.Empty:
                if not self.alive and answers.empty():
                    raise Gone(self._log_tail()) from None
                continue
            if batch is None:
                raise Gone(self._log_tail())
            yield from batch
            if isinstance(batch[-1], (Returned, Raised)):
                return

    def _log_tail(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
            return self._log.read().decode("utf-8", "replace")
        return ""

    def close(self) -> None:
        """End the child, and with it its actors."""
        self.alive = False
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # ends pending reads at both ends
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self._socket.close()


def _environment() -> dict[str, str]:
    """The child's environment, in which it imports this package independent of the working folder."""
    folder = str(Path(__file__).resolve().parents[2])
    paths = [folder, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return os.environ | {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "CUDA_VISIBLE_DEVICES": ""}
