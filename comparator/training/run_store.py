"""Runs on disk, to resume after their process was killed: `trainings/NAME/` with run.json, samples and checkpoints.

The process that trains a run has its lock, which the system releases if the process dies.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.core.result import ErrorInfo
from comparator.training import artifact
from comparator.training.tokenize import Corpus, Encoded
from comparator.training.types import TrainingState
from comparator.util import atomic_dir, disk
from comparator.util.records import record

_RUN, _SAMPLES = RECORDS = ("run.json", "samples.jsonl")  # all of a run but its checkpoints
_SETTING = "COMPARATOR_DATA_DIR"


@dataclass
class Run:
    """A run that this process has locked. `checkpoint`: the folder of the checkpoint to resume from, and its step."""

    name: str
    work: Path
    target: Path
    about: artifact.About
    train: tuple[Encoded, ...]
    heldout: tuple[Encoded, ...]
    lock: Any
    checkpoint: tuple[Path, int] | None = None

    def close(self) -> None:
        """Release the lock."""
        self.lock.release()

    def discard(self) -> None:
        atomic_dir.discard(self.work)
        self.close()


def names(work: Path) -> list[str]:
    """Names of the runs on disk, running or interrupted."""
    try:
        return sorted(p.name for p in work.iterdir() if p.name[0] != "." and (p / _RUN).is_file())
    except OSError:
        return []


def _lock(work: Path, name: str) -> Any:
    from filelock import FileLock, Timeout

    disk.make_folder(work / ".locks")
    lock = FileLock(work / ".locks" / f"{name}.lock", thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{name} is being trained by another process.", "Wait for it, or choose another name."
        ) from None
    return lock


def new(work: Path, about: artifact.About, target: Path, corpus: Corpus) -> Run:
    """Write a new run's folder atomically. Raises `UserError` for a full disk or a name that is taken."""
    place = work / about.name
    try:
        lock = _lock(work, about.name)
    except OSError as error:
        raise atomic_dir.disk_problem(error, place, "the training", _SETTING) or error from None
    try:
        if place.exists():
            raise UserError(
                f"There is an unfinished training run named {about.name}.",
                "Resume it or discard it (`train --resume`, `train --forget`), or choose another name.",
            )
        tmp = None
        try:
            tmp = atomic_dir.temporary(place, 0o700)
            with (tmp / _SAMPLES).open("w", encoding="utf-8") as lines:  # `commit` flushes it
                for heldout, part in ((False, corpus.train), (True, corpus.heldout)):
                    for e in part:
                        lines.write(json.dumps([heldout, e.row, e.full, e.ids, e.labels]) + "\n")
            run = {"target": str(target), "about": asdict(about)}
            (tmp / _RUN).write_text(json.dumps(run, ensure_ascii=False), encoding="utf-8")
            atomic_dir.commit(tmp, place)
        except OSError as error:
            if tmp is not None:
                shutil.rmtree(tmp, ignore_errors=True)
            raise atomic_dir.disk_problem(error, place, "the training", _SETTING) or error from None
    except BaseException:
        lock.release()
        raise
    return Run(about.name, place, target, about, corpus.train, corpus.heldout, lock)


def reopen(work: Path, name: str) -> Run:
    """A failed or interrupted run at its last complete checkpoint. Raises `UserError` if there is none."""
    place = work / name
    if name not in names(work):
        left = [n for n in names(work) if interrupted(work, n, strict=False)]
        raise UserError(
            f"There is no unfinished training run “{name}”.",
            f"Unfinished: {', '.join(left)}." if left else "Start a new one.",
        )
    lock = _lock(work, name)
    try:
        target, about = _read(place)
        checkpoint = artifact.last_checkpoint(place)
        if checkpoint is None:
            raise UserError(
                f"{name} was interrupted before its first checkpoint, so it cannot be resumed.",
                f"Start it again, after `train --forget {name}`.",
            )
        if target.exists() and any(target.iterdir()):
            raise UserError(f"{target} already exists.", "Nothing is overwritten: move it away first.")
        artifact.tidy(place)
        train, heldout = [], []
        for line in (place / _SAMPLES).read_text(encoding="utf-8").splitlines():
            is_held, row, full, ids, labels = json.loads(line)
            (heldout if is_held else train).append(Encoded(row, tuple(ids), tuple(labels), full))
    except (OSError, ValueError) as error:
        lock.release()
        raise UserError(
            f"The files of the unfinished run {name} cannot be read: {str(error)[:160]}", "Start it again."
        ) from None
    except BaseException:
        lock.release()
        raise
    return Run(name, place, target, about, tuple(train), tuple(heldout), lock, checkpoint)


def _read(place: Path) -> tuple[Path, artifact.About]:
    try:
        saved = json.loads((place / _RUN).read_text(encoding="utf-8"))
        return Path(saved["target"]), record(artifact.About, saved["about"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"The files of the unfinished run {place.name} cannot be read.", "Start it again."
        ) from None


def owner(work: Path, name: str) -> str | None:
    """The digest of the visitor whose run this is; None: the operator's, or there is none."""
    try:
        return _read(work / name)[1].owner
    except UserError:
        return None


def interrupted(work: Path, name: str, strict: bool = True) -> TrainingState | None:
    """The state of a run that no process trains any more. If there is none: raises `UserError`, or with `strict` False
    returns None."""
    try:
        if name not in names(work):
            raise UserError(f"There is no training run “{name}”.", "")
        lock = _lock(work, name)
        lock.release()
        _, about = _read(work / name)
    except UserError:
        if strict:
            raise
        return None
    checkpoint = artifact.last_checkpoint(work / name)
    if checkpoint:
        message = f"It was interrupted; its last checkpoint is at step {checkpoint[1]:,}."
    else:
        message = "It was interrupted before its first checkpoint."
    return TrainingState(
        job=name,
        request=replace(about.request, name=name),
        status="interrupted",
        message=message,
        step=checkpoint[1] if checkpoint else 0,
        checkpoint_step=checkpoint[1] if checkpoint else None,
        error=ErrorInfo(message, "Resume it." if checkpoint else "Start it again."),
    )


def remove(work: Path, name: str) -> None:
    """Discard a run. Raises `UserError` if another process trains it, or the disk refuses."""
    if name not in names(work):
        return
    lock = _lock(work, name)
    try:
        atomic_dir.discard(work / name)
    except OSError as error:
        raise atomic_dir.disk_problem(error, work / name, "the training", _SETTING) or error from None
    finally:
        lock.release()
