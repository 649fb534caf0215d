"""A function in a process of its own, with limits on time, memory and the size of its answer; killed over any of them.

    rows = supervised.call("comparator.training.remote_rows:rows", {"repo": "user/name"}, seconds=60, memory_bytes=4e9)

For what a stranger's files decide: a parser that hangs, swells or crashes there costs that one call. The child gets none
of this process's environment but what names folders and servers, so neither a token nor a password. Argument and answer
are JSON. `UserError` of the function is raised here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from typing import Any

from comparator.core.errors import UserError
from comparator.util import formatting

_PASSED_ON = ("HOME", "PATH", "LANG", "TMPDIR", "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_ENDPOINT", "HTTPS_PROXY",
              "HTTP_PROXY", "NO_PROXY", "https_proxy", "http_proxy", "no_proxy", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE",
              "SYSTEMROOT", "COMPARATOR_PUBLIC", "COMPARATOR_CACHE_DIR", "COMPARATOR_DATA_DIR")  # fmt: skip


class OverLimit(Exception):
    """The child was ended: `reason` says which limit it was, or that it crashed."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def call(
    function: str, argument: Any, *, seconds: float, memory_bytes: float, most_bytes: int = 64_000_000
) -> Any:
    """What `function` ("package.module:name") of this package returns for `argument`. Raises `OverLimit`."""
    with tempfile.TemporaryDirectory() as empty:  # where a name that looks like a relative path leads nowhere
        answer, late = _answer(
            function, json.dumps(argument).encode(), seconds, int(memory_bytes), most_bytes, empty
        )
    if late:
        raise OverLimit(f"it took longer than {seconds:g} s")
    if len(answer) > most_bytes:
        raise OverLimit(f"it returned more than {most_bytes / 1e6:,.0f} MB")
    try:
        outcome = json.loads(answer)
    except ValueError:
        raise OverLimit(f"its process ended, at a limit of {memory_bytes / 1e9:.1f} GB of memory") from None
    if "memory" in outcome:
        raise OverLimit(f"it needs more than {memory_bytes / 1e9:.1f} GB of memory")
    if "problem" in outcome:
        raise UserError(outcome["problem"], outcome["advice"])
    return outcome["result"]


def environment() -> dict[str, str]:
    """Of a process that knows no token and no password, and imports what this one does."""
    passed_on = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    path = os.pathsep.join(os.path.abspath(p) for p in sys.path if p)
    return passed_on | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def _answer(
    function: str, argument: bytes, seconds: float, memory_bytes: int, most_bytes: int, folder: str
) -> tuple[bytes, bool]:
    """(what the child wrote, whether it was late)."""
    child = subprocess.Popen(
        [sys.executable, "-m", "comparator.util.supervised", function, str(memory_bytes)],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    late = threading.Event()

    def end() -> None:
        late.set()
        child.kill()

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        return _exchange(child, argument, most_bytes), late.is_set()
    finally:
        timer.cancel()
        child.kill()
        child.wait()
        child.stdout.close()


def _exchange(child: subprocess.Popen, argument: bytes, most_bytes: int) -> bytes:
    try:
        child.stdin.write(argument)
        child.stdin.close()
    except OSError:  # it has ended already
        pass
    return child.stdout.read(most_bytes + 1)


def _main(function: str, memory_bytes: int) -> None:
    import importlib
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    module, _, name = function.partition(":")
    try:
        outcome = {"result": getattr(importlib.import_module(module), name)(json.load(sys.stdin))}
    except MemoryError:
        outcome = {"memory": True}
    except UserError as error:
        outcome = {"problem": error.problem, "advice": error.advice}
    except Exception as error:
        line = formatting.first_line(error, 200)
        outcome = {"problem": f"{type(error).__name__}: {line}", "advice": "It cannot be read."}
    out.write(json.dumps(outcome, default=str).encode())
    out.flush()
    os._exit(0)  # threads of libraries are not waited for


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]))
