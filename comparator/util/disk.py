"""Writing that a power cut does not undo. Everything that must last goes through here.

A file appears whole or not at all: its content is written beside its place and flushed, then renamed, and then the
folder is flushed, since a name that is only in memory is lost with the power. `tests/util/test_power_cuts.py` cuts the
power after each step of every writer and fails each step once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path
from typing import IO

_CANNOT = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # file systems that cannot flush a folder


def write(path: Path, data: bytes, *, mode: int = 0o600, part: Path | None = None) -> None:
    """Write or replace the file `path`; when this returns, it is on the disk.

    Args:
        mode: Of the new file, less the umask.
        part: Where the content is written first, on the same disk; by default a hidden name in the same folder.

    Raises `OSError`; then the old file is there, or the new one, and nothing half-written.
    """
    part = part or path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb", buffering=0, opener=lambda name, flags: os.open(name, flags, mode)) as file:
            left = memoryview(data)
            while left:
                left = left[os.write(file.fileno(), left) :]
            os.fsync(file.fileno())
        os.replace(part, path)
        flush_folder(path.parent)  # not the part's: a part that is still named is nobody's
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def rename(source: Path, target: Path) -> None:
    """Rename a flushed file or folder, replacing a file, and flush the folders that name it."""
    os.replace(source, target)
    flush_folder(target.parent)
    if source.parent != target.parent:
        flush_folder(source.parent)


def remove(path: Path) -> None:
    """Remove a file, if it is there; when this returns, it does not come back."""
    path.unlink(missing_ok=True)
    flush_folder(path.parent)


def touch(path: Path) -> None:
    """Make an empty file that only its owner can read, as a mark that lasts."""
    path.touch(mode=0o600)
    flush_folder(path.parent)


def make_folder(path: Path, mode: int = 0o700) -> None:
    """Make a folder, and those above it, that last; nothing happens where it is there."""
    if path.is_dir():
        return
    if path.parent != path:
        make_folder(path.parent, mode)
    path.mkdir(mode=mode, exist_ok=True)
    flush_folder(path.parent)


def flush(stream: IO[bytes]) -> None:
    """Write what was written to an open file to the disk; its name is the caller's to flush."""
    stream.flush()
    os.fsync(stream.fileno())


def flush_file(path: Path) -> None:
    """Write what the system still holds of a file's content to the disk."""
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


def flush_folder(folder: Path) -> None:
    """Write a folder's list of names to the disk."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except (
        PermissionError
    ):  # one that may be written to but not read; on Windows any folder, which needs no flush there
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    finally:
        os.close(handle)
