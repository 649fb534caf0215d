"""Folders that take long to make: built beside their place, moved there whole, once for all processes.

    with cache.building(path, progress=progress) as tmp:
        if tmp is not None:          # None: it is there already, perhaps made by another process meanwhile
            write_everything_into(tmp)

A folder at `path` is therefore always complete. Whatever goes wrong inside the `with` (an error, Stop, a
full disk) removes the temporary folder; what a killed process left is removed by the next one that builds the
same path. Knows nothing of models: what is kept here is the caller's business.
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

from comparator.types import Problem

Progress = Callable[[float | None, str], None]

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_SETTING = "COMPARATOR_CACHE_DIR"  # where folders are kept, unless the caller says otherwise
_SPARE_BYTES = 64 * 10**6  # what a disk should keep free beyond what we write


@contextmanager
def building(
    path: Path,
    *,
    progress: Progress | None = None,
    need_bytes: int = 0,
    what: str = "the cache",
    setting: str = _SETTING,
) -> Iterator[Path | None]:
    """A temporary folder that becomes `path` when the block ends well; None where `path` is there already.

    `need_bytes` (what will be written, about) is checked against the free space first. `progress` is called
    with (None, message) while another process builds the same folder, and may raise `Stopped`. `what` names
    the content in messages, `setting` the variable that says where it goes. Raises `Problem` when the disk is full or cannot be written to.
    """
    path = Path(path)
    if path.exists():
        yield None
        return
    with _disk_problems(path, what, setting), _lock(path, progress, setting):
        if path.exists():
            yield None
            return
        _remove_leftovers(path)
        _check_space(path, need_bytes, what, setting)
        tmp = _temporary(path)
        try:
            yield tmp
            _finish(tmp)
            os.rename(tmp, path)
            _flush_folder(path.parent)
        finally:
            shutil.rmtree(tmp, ignore_errors=True)


def remove(path: Path) -> None:
    """Delete a folder of the cache, so that nobody ever sees half of it. Missing is fine."""
    path = Path(path)
    if not path.exists():
        return
    with _disk_problems(path, path.name, _SETTING), _lock(path, None, _SETTING):
        trash = _temporary(path)
        try:
            os.rename(path, trash / path.name)
        except FileNotFoundError:
            pass
        finally:
            shutil.rmtree(trash, ignore_errors=True)


def disk_problem(error: BaseException, path: Path, what: str, setting: str = _SETTING) -> Problem | None:
    """The `Problem` behind an error of writing under `path`, or None if the disk is not to blame.

    Also reads the errors of libraries that wrap the system's in types of their own (safetensors).
    """
    code = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if code is None and (told := re.search(r"\(os error (\d+)\)", text)):
        code = int(told[1])  # Rust's way of writing errno
    elsewhere = isinstance(error, OSError) and error.filename and not _is_under(error.filename, path.parent)
    if code in _FULL or "No space left" in text:
        return Problem(
            f"The disk filled up while {what} was written to {path.parent}.",
            f"Free some space there, or set {setting} to a folder on another disk. "
            "Nothing half-written was kept.",
        )
    if code in _REFUSED and not elsewhere:
        return Problem(
            f"{path.parent} cannot be written to, so {what} cannot be kept there.",
            f"Set {setting} to a folder that you may write to.",
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
    except Problem:
        raise
    except Exception as error:
        if problem := disk_problem(error, path, what, setting):
            raise problem from error
        raise


@contextmanager
def _lock(path: Path, progress: Progress | None, setting: str) -> Iterator[None]:
    """Held by one thread of one process at a time; the system lets it go when its holder dies."""
    from filelock import FileLock, Timeout

    folder = path.parent / ".locks"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if disk_problem(error, path, "the cache"):
            raise
        raise Problem(
            f"The cache folder {path.parent} cannot be made: {error.strerror or error}.",
            f"Set {setting} to a folder that you may write to.",
        ) from error
    lock = FileLock(folder / f"{path.name}.lock")
    told_s = 0.0
    while True:
        try:
            lock.acquire(timeout=0.1)
            break
        except Timeout:
            if progress and time.monotonic() - told_s >= 0.25:
                told_s = time.monotonic()
                progress(None, f"waiting for another process that is writing {path.name}")
    try:
        yield
    finally:
        lock.release()


def _prefix(path: Path) -> str:
    return f".{path.name}.tmp-"


def _temporary(path: Path) -> Path:
    """A new folder beside `path`: a rename between them is one step. Its mode follows the umask."""
    tmp = path.parent / f"{_prefix(path)}{secrets.token_hex(6)}"
    tmp.mkdir()
    return tmp


def _remove_leftovers(path: Path) -> None:
    """What a killed process left of this very folder; the lock is ours, so nobody is writing to it."""
    for old in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        shutil.rmtree(old, ignore_errors=True)


def _check_space(path: Path, need_bytes: int, what: str, setting: str) -> None:
    free = shutil.disk_usage(path.parent).free
    if need_bytes and free < need_bytes + _SPARE_BYTES:
        raise Problem(
            f"Writing {what} takes {need_bytes / 1e6:,.0f} MB, and {path.parent} has {free / 1e6:,.0f} MB free.",
            f"Free some space there, or set {setting} to a folder on another disk.",
        )


def _finish(folder: Path) -> None:
    """Everything on the disk before the name says that it is complete; readable as the umask would have it.

    Temporary folders, and the files that safetensors writes, are private, which would shut out the other users
    of a shared cache.
    """
    mode = folder.stat().st_mode
    for root, _, files in os.walk(folder):
        for name in files:
            file = os.path.join(root, name)
            if os.path.islink(file):
                continue
            os.chmod(file, mode & 0o666)
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        os.chmod(root, mode & 0o777)
        _flush_folder(Path(root))


def _flush_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder cannot be opened on Windows; there is nothing to flush there
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot flush a folder
            raise
    finally:
        os.close(handle)
