"""Unexpected exceptions → a rotating log file and an `ErrorReport`: traceback, versions, request, without secrets.

A traceback holds the frames that hold the tensors, so it is formatted at once and then dropped (`release`). The file is
`logs/comparator.log` in the data folder, readable by its owner alone, created by the first entry. Hugging Face tokens
are replaced by `hf_…` and prompts that are running (`hidden`) by `[prompt]`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import logging
import logging.handlers
import os
import platform
import re
import secrets
import socket
import sys
import threading
import traceback
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from comparator.core.errors import ErrorReport, Stopped, UserError
from comparator.core.settings import get_settings

MAX_BYTES, BACKUPS = 2_000_000, 5
MAX_REPORTS = 100  # kept in this process for `find`; older ones are in the file only
SHORTEST_PROMPT = 4  # characters; a shorter prompt would match parts of other words

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{4,}|(?<=[Bb]earer )[^\s'\"]+")
_PATH = re.compile(r"(?<![\w.:/])(?:~|/[\w.+@-]+)(?:/[\w.+@ -]*[\w.+@-])+/?")
_PRIVATE = ("prompt", "system")

_log = logging.getLogger("comparator.errors")
_reports: OrderedDict[str, ErrorReport] = OrderedDict()
_hidden: Counter[str] = Counter()
_lock = threading.Lock()


# ---------------------------------------------------------------- what is recorded


def record(error: BaseException, doing: str) -> ErrorReport:
    """Log `error` with its traceback and return the report.

    doing: the operation, as in "load nf4". The exception is unchanged; `release` drops its frames.
    """
    lines = traceback.TracebackException.from_exception(error, compact=True).format()
    report = ErrorReport(
        id=secrets.token_hex(4),
        doing=scrub(doing or "run"),
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        traceback=scrub("".join(lines)),
        environment=versions(),
        machine=socket.gethostname(),
    )
    report = dataclasses.replace(report, log_file=_write(logging.ERROR, report.details))
    _remember(report)
    return report


def fallback(instead: str, reason: BaseException | str) -> None:
    """Log that a slower path is used, and why: with the traceback if `reason` is an exception.

    instead: what is done now, as in "decode without the fused kernels".
    """
    if isinstance(reason, BaseException):
        lines = traceback.TracebackException.from_exception(reason, compact=True).format()
        reason = "".join(lines)
    text = scrub(f"Fallback: {instead}, because:\n{reason.strip()}\n")
    _write(logging.WARNING, text)
    logging.getLogger("comparator.fallback").debug(text)


def adopt(error: BaseException) -> None:
    """Log the report of an exception from another process, unless that process wrote to the same file."""
    report = getattr(error, "report", None)
    if report is None or find(report.id):
        return
    if (report.machine, report.log_file) != (socket.gethostname(), str(log_file())):
        _write(logging.ERROR, f"On {report.machine}:\n{scrub(report.details)}")
    _remember(report)


def with_request(error: UserError, request: Any) -> str | None:
    """Add the request (a dataclass), without prompt and system prompt, to the error's report. Returns the report's id, or
    None if the error has no report."""
    if error.report is None:
        return None
    adopt(error)
    fields = {f.name: getattr(request, f.name) for f in dataclasses.fields(request) if f.name not in _PRIVATE}
    text = "\n".join(f"{name}: {value}" for name, value in fields.items() if value not in (None, "", ()))
    text = scrub(f"Request:\n{text}")
    error.report = dataclasses.replace(error.report, request=text)
    _write(logging.ERROR, f"Error {error.report.id}: {text}\n")
    _remember(error.report)
    return error.report.id


def find(report_id: str | None) -> ErrorReport | None:
    """The report with this id, one of the last that this process recorded or adopted; None otherwise."""
    with _lock:
        return _reports.get(report_id or "")


def _remember(report: ErrorReport) -> None:
    with _lock:
        _reports[report.id] = report
        while len(_reports) > MAX_REPORTS:
            _reports.popitem(last=False)


def release(error: BaseException | None) -> None:
    """Drop the tracebacks of an exception and of its causes: their frames hold tensors."""
    stack, released = [error], set()
    while stack:
        item = stack.pop()
        if item is None or id(item) in released:
            continue
        released.add(id(item))
        item.__traceback__ = None
        stack += [item.__cause__, item.__context__, *getattr(item, "exceptions", ())]


# ---------------------------------------------------------------- secrets


@contextlib.contextmanager
def hidden(*texts: str | None) -> Iterator[None]:
    """A context in which these texts (prompts) are replaced in what any thread of this process records."""
    long_enough = [t.strip() for t in texts if t and len(t.strip()) >= SHORTEST_PROMPT]
    with _lock:
        _hidden.update(long_enough)
    try:
        yield
    finally:
        with _lock:
            _hidden.subtract(long_enough)
            for text in long_enough:
                if _hidden[text] <= 0:
                    del _hidden[text]


def scrub(text: str) -> str:
    """`text` without Hugging Face tokens and `hidden` prompts, both plain and as in `repr`."""
    with _lock:
        prompts = sorted(_hidden, key=len, reverse=True)
    for prompt in prompts:
        for form in (prompt, repr(prompt)[1:-1], prompt.encode("unicode_escape").decode()):
            text = text.replace(form, "[prompt]")
    return _TOKEN.sub("hf_…", text)


def without_paths(text: str) -> str:
    """`text` with absolute paths replaced by `…`, for visitors of a public installation."""
    return _PATH.sub("…", text)


def shorten_paths(text: str, typed: Iterable[str]) -> str:
    """`text` with absolute paths reduced to their last part, but for those inside what the person typed."""
    typed = tuple(filter(None, typed))
    return _PATH.sub(
        lambda m: m[0] if m[0].startswith(typed) else f"…/{m[0].rstrip('/').rpartition('/')[2]}", text
    )


# ---------------------------------------------------------------- the file


def log_file() -> Path:
    """Path of the log file, which may not exist yet."""
    return get_settings().data_dir / "logs" / "comparator.log"


def setup() -> None:
    """Also write warnings of the project's loggers and uncaught exceptions to the file."""
    logger = logging.getLogger("comparator")
    if _handler(log_file()) not in logger.handlers:
        logger.addHandler(_handler(log_file()))
        logger.addHandler(logging.lastResort)  # otherwise used only while there is no other handler
    main_hook, thread_hook = sys.excepthook, threading.excepthook

    def uncaught(kind, error, frames):
        _record_uncaught(error, "run")
        main_hook(kind, error, frames)

    def uncaught_in_thread(args):
        _record_uncaught(args.exc_value, f"run thread {args.thread.name if args.thread else '?'}")
        thread_hook(args)

    sys.excepthook, threading.excepthook = uncaught, uncaught_in_thread


def _record_uncaught(error: BaseException | None, doing: str) -> None:
    if isinstance(error, Exception) and not isinstance(error, (UserError, Stopped)):
        record(error, doing)


def _write(level: int, text: str) -> str | None:
    """Append an entry, independent of the loggers' levels. Returns the file's path, None if it cannot be written."""
    handler = _handler(log_file())
    return str(log_file()) if handler.write(level, text) else None


@cache
def _handler(path: Path) -> PrivateFile:
    return PrivateFile(path)


class PrivateFile(logging.handlers.RotatingFileHandler):
    """A rotating file that only its owner may read, created by its first entry. Never raises if it cannot be written."""

    def __init__(self, path: Path, max_bytes: int = MAX_BYTES, backups: int = BACKUPS):
        super().__init__(path, maxBytes=max_bytes, backupCount=backups, encoding="utf-8", delay=True)
        self.setLevel(logging.WARNING)
        self.setFormatter(_Scrubbed("%(asctime)s %(levelname)s %(name)s pid %(process)d: %(message)s"))
        self._failed = False

    def write(self, level: int, text: str) -> bool:
        """Append `text` as an entry. Returns whether it was written."""
        self._failed = False
        self.handle(_log.makeRecord(_log.name, level, "", 0, text, (), None))
        return not self._failed

    def _open(self):
        folder = os.path.dirname(self.baseFilename)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        number = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return os.fdopen(number, "a", encoding=self.encoding, errors="backslashreplace")

    def handleError(self, record: logging.LogRecord) -> None:
        self._failed = True


class _Scrubbed(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return scrub(super().format(record))


# ---------------------------------------------------------------- versions


def versions() -> str:
    """Versions of Python and the system, and of every imported library, as two lines."""
    names = sorted({n.partition(".")[0] for n in list(sys.modules)} - sys.stdlib_module_names)
    libraries = []
    for name in names:
        if not name.startswith("_"):
            with contextlib.suppress(Exception):  # no distribution of this name
                libraries.append(f"{name} {importlib.metadata.version(name)}")
    return f"Python {platform.python_version()}, {platform.platform()}\n{', '.join(libraries)}"
