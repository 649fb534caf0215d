"""Folders that take long to write: built next to their path, then renamed, once for all processes.

    with cache.building(path, progress=progress) as tmp:
        if tmp is not None:          # None: it exists already, perhaps made by another process meanwhile
            write_everything_into(tmp)

A folder at `path` is therefore always complete. A failure inside the `with` (an error, Stop, a full disk) removes the
temporary folder; one left by a killed process is removed by the next one that builds the same path.
"""

from __future__ import annotations

import errno
import glob
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from comparator.core.errors import UserError
from comparator.util import disk

Progress = Callable[[float | None, str], None]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FAILED = {errno.EIO, errno.ENODEV, errno.ESTALE}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_SETTING = "COMPARATOR_CACHE_DIR"  # the default of `setting`
_SPARE_BYTES = 64 * 10**6  # left free on the disk beyond what is written


@contextmanager
def building(
    path: Path,
    *,
    progress: Progress | None = None,
    need_bytes: int = 0,
    what: str = "the cache",
    setting: str = _SETTING,
    mode: int = 0o777,
) -> Iterator[Path | None]:
    """A temporary folder that becomes `path` when the block succeeds; None if `path` exists already.

    `need_bytes` (roughly what will be written) is checked against the free space first. `progress` is called with
    (None, message) while another process builds the same folder, and may raise `Stopped`. `what` names the content in
    messages, `setting` the variable that sets its location, `mode` (less the umask) who may enter. Raises `UserError`
    when the disk is full or not writable.
    """
    path = Path(path)
    if path.exists():
        yield None
        return
    with _disk_problems(path, what, setting), _lock(path, progress, setting):
        if path.exists():
            yield None
            return
        check_space(path, need_bytes, what, setting)
        tmp = temporary(path, mode)
        try:
            yield tmp
            commit(tmp, path)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def commit(tmp: Path, path: Path) -> None:
    """Rename a complete folder to its place; when this returns, a power cut does not undo it."""
    _finish(tmp)
    disk.rename(tmp, path)


def remove(path: Path) -> None:
    """Delete a folder atomically, if it exists."""
    path = Path(path)
    if not path.exists():
        return
    with _disk_problems(path, path.name, _SETTING), _lock(path, None, _SETTING):
        discard(path)


def discard(path: Path) -> None:
    """Delete a folder atomically, if it exists; the caller has a lock, so that nobody else does."""
    if not path.exists():
        return
    trash = temporary(path)
    try:
        disk.rename(path, trash / path.name)
    finally:
        shutil.rmtree(trash, ignore_errors=True)


def disk_problem(error: BaseException, path: Path, what: str, setting: str = _SETTING) -> UserError | None:
    """The `UserError` for an error of writing under `path`, or None if the disk is not the cause.

    Also recognizes the system's errors that libraries (safetensors) wrap in their own types.
    """
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if code is None and (match := re.search(r"\(os error (\d+)\)", text)):
        code = int(match[1])  # errno as Rust prints it
    elsewhere = isinstance(error, OSError) and error.filename and not _is_under(error.filename, path.parent)
    if code in _FULL or "No space left" in text:
        return UserError(
            f"The disk filled up while {what} was written to {path.parent}.",
            f"Free some space there, or set {setting} to a folder on another disk. "
            "The partly written files were removed.",
        )
    if code in _REFUSED and not elsewhere:
        return UserError(
            f"{path.parent} cannot be written to, so {what} cannot be kept there.",
            f"Set {setting} to a writable folder.",
        )
    if code in _FAILED and not elsewhere:
        return UserError(
            f"The disk failed while {what} was written to {path.parent}: {os.strerror(code)}.",
            f"Check the system's log, or set {setting} to a folder on another disk.",
        )
    return None


def _is_under(file: str | bytes | int, folder: Path) -> bool:
    return isinstance(file, str | bytes) and os.path.abspath(os.fsdecode(file)).startswith(
        os.path.abspath(folder)
    )


@contextmanager
def _disk_problems(path: Path, what: str, setting: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if problem := disk_problem(error, path, what, setting):
            raise problem from error
        raise


@contextmanager
def _lock(path: Path, progress: Progress | None, setting: str) -> Iterator[None]:
    """A lock of one thread of one process at a time, which the system releases if the process dies."""
    from filelock import FileLock, Timeout

    folder = path.parent / ".locks"
    try:
        disk.make_folder(folder, 0o777)
    except OSError as error:
        if disk_problem(error, path, "the cache"):
            raise
        raise UserError(
            f"The cache folder {path.parent} cannot be created: {error.strerror or error}.",
            f"Set {setting} to a writable folder.",
        ) from error
    lock = FileLock(folder / f"{path.name}.lock")
    reported_s = 0.0
    while True:
        try:
            lock.acquire(timeout=0.1)
            break
        except Timeout:
            if progress and time.monotonic() - reported_s >= 0.25:
                reported_s = time.monotonic()
                progress(None, f"waiting for another process that is writing {path.name}")
    try:
        yield
    finally:
        lock.release()


def _prefix(path: Path) -> str:
    return f".{path.name}.tmp-"


def temporary(path: Path, mode: int = 0o777) -> Path:
    """A new folder next to `path`, so that renaming it is atomic. Its mode follows the umask.

    What killed processes have left of such folders is removed. The caller has the lock, so nobody writes to it.
    """
    for old in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        shutil.rmtree(old, ignore_errors=True)
    tmp = path.parent / f"{_prefix(path)}{secrets.token_hex(6)}"
    tmp.mkdir(mode)
    return tmp


def check_space(path: Path, need_bytes: int, what: str, setting: str = _SETTING) -> None:
    """Raises `UserError` where the disk has not the room for `need_bytes` beside `path`."""
    free = shutil.disk_usage(path.parent).free
    if need_bytes and free < need_bytes + _SPARE_BYTES:
        raise UserError(
            f"Writing {what} takes {need_bytes / 1e6:,.0f} MB, and {path.parent} has {free / 1e6:,.0f} MB free.",
            f"Free some space there, or set {setting} to a folder on another disk.",
        )


def _finish(folder: Path) -> None:
    """Flush everything to the disk before the rename, and set modes by the umask.

    Temporary folders and safetensors' files are private, which would exclude the other users of a shared cache.
    """
    mode = folder.stat().st_mode
    for root, _, files in os.walk(folder):
        for name in files:
            file = os.path.join(root, name)
            if os.path.islink(file):
                continue
            os.chmod(file, mode & 0o666)
            disk.flush_file(Path(file))
        os.chmod(root, mode & 0o777)
        disk.flush_folder(Path(root))
