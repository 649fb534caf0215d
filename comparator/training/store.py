"""Runs on disk: what a killed process leaves to go on from. `trainings/NAME/` holds run.json, samples and checkpoints.

A run's lock is held by the process that trains, and let go by the system when that dies.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from comparator import cache
from comparator.training import folder
from comparator.training.settings import TrainSettings
from comparator.training.tokens import Corpus, Encoded
from comparator.training.types import DataSource, TrainingState, TrainRequest
from comparator.types import ErrorInfo, Problem

_RUN, _SAMPLES = "run.json", "samples.jsonl"
_SETTING = "COMPARATOR_DATA_DIR"


@dataclass
class Run:
    """A run that this process holds. `checkpoint`: what to go on from, and its step."""

    name: str
    work: Path
    target: Path
    about: folder.About
    train: tuple[Encoded, ...]
    held: tuple[Encoded, ...]
    lock: Any
    checkpoint: tuple[Path, int] | None = None

    def close(self) -> None:
        """Let others take it."""
        self.lock.release()

    def discard(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        self.close()


def names(work: Path) -> list[str]:
    """Runs that are on disk, held by anyone or left."""
    try:
        return sorted(p.name for p in work.iterdir() if (p / _RUN).is_file())
    except OSError:
        return []


def _lock(work: Path, name: str) -> Any:
    from filelock import FileLock, Timeout

    (work / ".locks").mkdir(parents=True, exist_ok=True)
    lock = FileLock(work / ".locks" / f"{name}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise Problem(
            f"{name} is being trained by another process.", "Wait for it, or choose another name."
        ) from None
    return lock


def new(work: Path, about: folder.About, target: Path, corpus: Corpus) -> Run:
    """A new run's folder, written whole. Raises `Problem` for a full disk or a name that is taken."""
    place = work / about.name
    try:
        lock = _lock(work, about.name)
    except OSError as error:
        raise cache.disk_problem(error, place, "the training", _SETTING) or error from None
    try:
        if place.exists():
            raise Problem(
                f"An unfinished training is called {about.name}.",
                "Resume it or throw it away (`train --resume`, `train --forget`), or choose another name.",
            )
        tmp = work / f".{about.name}.tmp-{os.getpid()}"
        shutil.rmtree(tmp, ignore_errors=True)
        try:
            tmp.mkdir(parents=True)
            with (tmp / _SAMPLES).open("w", encoding="utf-8") as lines:
                for held, part in ((False, corpus.train), (True, corpus.held)):
                    for e in part:
                        lines.write(json.dumps([held, e.row, e.full, e.ids, e.labels]) + "\n")
            told = {"target": str(target), "about": asdict(about)}
            (tmp / _RUN).write_text(json.dumps(told, ensure_ascii=False), encoding="utf-8")
            os.rename(tmp, place)
        except OSError as error:
            shutil.rmtree(tmp, ignore_errors=True)
            raise cache.disk_problem(error, place, "the training", _SETTING) or error from None
    except BaseException:
        lock.release()
        raise
    return Run(about.name, place, target, about, corpus.train, corpus.held, lock)


def reopen(work: Path, name: str) -> Run:
    """A run that a killed or failed process left, at its last whole checkpoint. Raises `Problem` where there is none."""
    place = work / name
    if name not in names(work):
        left = [n for n in names(work) if interrupted(work, n, strict=False)]
        raise Problem(
            f"There is no unfinished training “{name}”.",
            f"Unfinished: {', '.join(left)}." if left else "Start a new one.",
        )
    lock = _lock(work, name)
    try:
        target, about = _read(place)
        found = folder.last_checkpoint(place)
        if found is None:
            raise Problem(
                f"{name} was ended before its first checkpoint, so there is nothing to go on from.",
                f"Start it again, after `train --forget {name}`.",
            )
        if target.exists() and any(target.iterdir()):
            raise Problem(f"{target} is there already.", "Nothing is overwritten: move it away first.")
        folder.tidy(place)
        train, held = [], []
        for line in (place / _SAMPLES).read_text(encoding="utf-8").splitlines():
            is_held, row, full, ids, labels = json.loads(line)
            (held if is_held else train).append(Encoded(row, tuple(ids), tuple(labels), full))
    except (OSError, ValueError) as error:
        lock.release()
        raise Problem(
            f"What is left of {name} cannot be read: {str(error)[:160]}", "Start it again."
        ) from None
    except BaseException:
        lock.release()
        raise
    return Run(name, place, target, about, tuple(train), tuple(held), lock, found)


def _read(place: Path) -> tuple[Path, folder.About]:
    try:
        told = json.loads((place / _RUN).read_text(encoding="utf-8"))
        about = dict(told["about"])
        about["request"] = request_from(about["request"])
        about["notes"] = tuple(about["notes"])
        return Path(told["target"]), folder.About(**about)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise Problem(f"What is left of {place.name} cannot be read.", "Start it again.") from None


def request_from(found: dict[str, Any]) -> TrainRequest:
    """A request from its JSON."""
    settings = dict(found["settings"])
    settings["target_modules"] = tuple(settings["target_modules"])
    data = dict(found["data"])
    data["columns"] = tuple((a, b) for a, b in data["columns"])
    return TrainRequest(**{**found, "settings": TrainSettings(**settings), "data": DataSource(**data)})


def interrupted(work: Path, name: str, strict: bool = True) -> TrainingState | None:
    """The state of a run that nobody works on any more. `strict`: raises `Problem` where there is none, instead of
    giving None."""
    try:
        if name not in names(work):
            raise Problem(f"There is no training “{name}”.", "")
        lock = _lock(work, name)
        lock.release()
        _, about = _read(work / name)
    except Problem:
        if strict:
            raise
        return None
    found = folder.last_checkpoint(work / name)
    if found:
        said = f"It was ended from outside; its last checkpoint is at step {found[1]:,}."
    else:
        said = "It was ended from outside, before its first checkpoint."
    return TrainingState(
        job=name,
        request=replace(about.request, name=name),
        status="interrupted",
        message=said,
        step=found[1] if found else 0,
        checkpoint_step=found[1] if found else None,
        error=ErrorInfo(said, "Resume it." if found else "Start it again."),
    )


def remove(work: Path, name: str) -> None:
    """Throw a run away. Raises `Problem` where another process works on it."""
    if name not in names(work):
        return
    lock = _lock(work, name)
    shutil.rmtree(work / name, ignore_errors=True)
    lock.release()
