"""Python processes that this one starts, and those that report how far they are: both ends of the pipe.

Work goes into a process of its own where Stop shall end it at once, where a crash shall be a message only, or where a
library changes the process that it is in.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from comparator.core.errors import UserError
from comparator.util import formatting

_ROOT = Path(__file__).resolve().parents[2]


def python_path() -> str:
    """PYTHONPATH for a process that imports this package whatever its working folder is: this package's folder first."""
    return os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))


def offline_environment(**more: str) -> dict[str, str]:
    """Of a process that asks no hub and knows no token."""
    hidden = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    environment = {k: v for k, v in os.environ.items() if k not in hidden}
    return environment | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONIOENCODING": "utf-8",
        "PYTHONPATH": python_path(),
        **more,
    }


@dataclass(frozen=True)
class Ended:
    """How a reporting process ended: its exit code (negative: the signal), what it reported, and its stderr."""

    code: int
    reports: list[dict[str, Any]]
    errors: str

    @property
    def problem(self) -> dict[str, Any] | None:
        """What it said of its failure: {"problem", "advice", "errno"}; None where it said nothing."""
        return next((report for report in reversed(self.reports) if "problem" in report), None)

    @property
    def last_error(self) -> str:
        """The last line of its stderr, or its exit code."""
        lines = self.errors.strip().splitlines()
        return lines[-1][:300] if lines else f"exit code {self.code}"


def run_reporting(
    module: str,
    request: dict[str, Any],
    environment: dict[str, str],
    progress: Callable[[float | None, str], None],
    cwd: Path | None = None,
) -> Ended:
    """Run `python -m module`, whose main is `report`, with this request. `progress` is called four times a second with the
    last fraction and message; where it raises, the process is ended at once."""
    # The child ends when its stdin does, so nothing goes on after we have been killed.
    child = subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment, cwd=cwd, text=True, encoding="utf-8", errors="replace",
    )  # fmt: skip
    reports: list[dict] = []
    errors: list[str] = []
    readers = [
        threading.Thread(target=_read, args=(child.stdout, reports), daemon=True, name="child-out"),
        threading.Thread(target=lambda: errors.append(child.stderr.read()), daemon=True, name="child-err"),
    ]
    for reader in readers:
        reader.start()
    try:
        with contextlib.suppress(OSError):  # it ended before it read
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
        while child.poll() is None:
            last = reports[-1] if reports else {"fraction": 0.0, "message": "starting"}
            progress(last.get("fraction"), last.get("message", ""))
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.25)
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        for reader in readers:
            reader.join(5)
        for stream in (child.stdin, child.stdout, child.stderr):
            with contextlib.suppress(OSError):
                stream.close()
    return Ended(child.returncode, reports, "".join(errors))


def _read(stream: Any, into: list[dict]) -> None:
    for line in stream:
        try:
            into.append(json.loads(line))
        except ValueError:
            continue  # a library wrote to stdout


def report(
    work: Callable[[dict[str, Any], Callable[[float | None, str], None]], None], advice: str
) -> NoReturn:
    """The main of a process that `run_reporting` runs: `work(request, progress)`, then the end of the process.

    advice: what to do about a failure that is no `UserError`.
    """
    out = os.dup(1)
    os.dup2(2, 1)  # what libraries print goes to stderr

    def tell(line: dict[str, Any]) -> None:
        os.write(out, (json.dumps(line) + "\n").encode())

    def end_with_parent() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    request = json.loads(sys.stdin.buffer.readline() or "{}")
    threading.Thread(target=end_with_parent, daemon=True).start()
    try:
        work(request, lambda fraction, message: tell({"fraction": fraction, "message": message}))
    except UserError as problem:
        tell({"problem": problem.problem, "advice": problem.advice})
        os._exit(1)
    except BaseException as error:  # a library may call sys.exit
        text = formatting.first_line(error, 400)
        tell({"problem": text, "advice": advice, "errno": getattr(error, "errno", None)})
        os._exit(1)
    os._exit(0)  # torch's own exit takes seconds, and everything is written
