"""Answers of a prompt set on disk as they come, so that an interrupted run goes on where it was.

One file per run, a JSON object per line, each flushed to the disk. A run that asks for the same thing on the same machine
takes up the file; a run that ends removes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from comparator.core.prompt_set import SetAnswer
from comparator.util import disk

if TYPE_CHECKING:
    from comparator.core.request import Request
    from comparator.core.result import Environment
    from comparator.engine.column import Column

DAYS = 30  # an interrupted run is forgotten after so many

log = logging.getLogger(__name__)


class Journal:
    """`answers[(column, prompt)]`, and `tokens[prompt]`: the token ids of the reference's answer."""

    def __init__(self, file: BinaryIO | None = None):
        """`file`: open for reading and appending, locked; None keeps nothing on the disk."""
        self.answers: dict[tuple[int, int], SetAnswer] = {}
        self.tokens: dict[int, tuple[int, ...]] = {}
        self._file = file
        if file is not None:
            self._read(file)

    def _read(self, file: BinaryIO) -> None:
        """Whole lines; what a killed process left behind them is cut off."""
        end = 0
        for line in file:
            try:
                column, prompt, answer, tokens = json.loads(line)
                self.answers[column, prompt] = SetAnswer(
                    **{**answer, "earlier": tuple(answer.get("earlier", ()))}
                )
            except (ValueError, TypeError):
                break
            if tokens is not None:
                self.tokens[prompt] = tuple(tokens)
            end += len(line)
        file.seek(end)
        file.truncate()

    def add(self, column: int, prompt: int, answer: SetAnswer, tokens: Sequence[int] | None = None) -> None:
        """`tokens`: of the reference's answer. On the disk when this returns; a full disk ends the file, not the run."""
        self.answers[column, prompt] = answer
        if tokens is not None:
            self.tokens[prompt] = tuple(tokens)
        if self._file is None:
            return
        line = json.dumps([column, prompt, asdict(answer), None if tokens is None else list(tokens)])
        try:
            self._file.write(line.encode() + b"\n")
            disk.flush(self._file)
        except OSError as error:
            log.warning("The answers of a prompt set are not kept on the disk: %s", error)
            self.close()

    def close(self, remove: bool = False) -> None:
        """`remove`: the run has ended, nothing of it is needed any more."""
        if self._file is not None:
            if remove:
                Path(self._file.name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None


def open_journal(folder: Path, key: str, resume: bool = True) -> Journal:
    """The journal of an interrupted run with this key, else a new one; without a file where none can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_old(folder)
        for path in sorted(folder.glob(f"{key}-*.jsonl")) if resume else ():
            file = path.open("r+b")
            if _lock(file):
                return Journal(file)
            file.close()  # another process is at it
        file = (folder / f"{key}-{secrets.token_hex(4)}.jsonl").open("x+b")
        disk.flush_folder(folder)
        _lock(file)
        return Journal(file)
    except OSError as error:
        log.warning("The answers of a prompt set are not kept on the disk: %s", error)
        return Journal()


def key_of(
    request: Request,
    columns: Sequence[Column],
    reference: Column,
    environment: Environment,
    requests: Any = None,
) -> str:
    """What the answers follow from, as a hash: the set or a task's `requests`, the settings, the columns' weights, the machine
    and its packages."""
    settings = asdict(request.settings)
    del settings["repeats"]
    parts: list[Any] = [
        asdict(request.prompts) if request.prompts else requests, settings, request.chat, asdict(request.template),
        request.fidelity == "none", request.batch, asdict(environment),
        [(c.result.label, asdict(c.result.model) if c.result.model else None, c is reference) for c in columns],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _lock(file: BinaryIO) -> bool:
    """Whether the file is this process's alone; it stays so until it is closed."""
    try:
        import fcntl
    except ImportError:  # Windows keeps others from removing an open file instead
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_old(folder: Path) -> None:
    for path in folder.glob("*.jsonl"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > DAYS * 86_400:
                path.unlink()
