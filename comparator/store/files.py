"""Saved comparisons as files: an immutable document each, and a small sidecar beside it that may change.

    DATA_DIR/comparisons/ID.json        the document, written once
    DATA_DIR/comparisons/ID.meta.json   its sidecar: name, owner, deletion, votes, and a summary for the index
    DATA_DIR/tmp/                       what is being written; nothing else ever looks in here
    DATA_DIR/purging/ID                 is being removed permanently (an empty file)
    DATA_DIR/purged/ID                  was removed everywhere; kept for a day

Every file appears whole or not at all: written to a temporary file, flushed to the disk, renamed, and the folder
flushed. The sidecar comes first and the document last, so every document has its owner. They go in the other order:
a document without its sidecar would look like one that was never deleted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import StrictBool

from comparator.core.errors import UserError
from comparator.core.result import Comparison
from comparator.core.votes import Votes
from comparator.store.links import check_id
from comparator.util import disk
from comparator.util.records import record

log = logging.getLogger(__name__)

MAX_SIDECAR_BYTES = 4_000_000  # the most votes, and reasons of judges with each character escaped
MAX_NAME = 200  # characters
MAX_EXCERPT = 4_000  # characters of the prompt that are kept in the summary, and so can be searched
_ABANDONED_S = 3600.0  # a temporary file of another machine is left alone for this long
_REMEMBERED_S = 86_400.0  # how long a finished removal is remembered
_DOCUMENT, _SIDECAR = ".json", ".meta.json"


@dataclass(frozen=True)
class Summary:
    """What the history shows of a document, so that listing ten thousand opens none of them."""

    created_at: str
    model: str
    variants: tuple[str, ...]  # the columns' labels
    prompt: str  # its first MAX_EXCERPT characters
    prompt_key: str  # equal for comparisons of the same prompt and system prompt
    device: str | None = None


@dataclass(frozen=True)
class Sidecar:
    """What may change about a saved comparison, or is not part of it. `owner` is a digest, never the visitor's key."""

    owner: str | None
    saved_at: str  # UTC, ISO 8601
    name: str = ""
    deleted_at: str | None = None
    imported: StrictBool = False  # came from a file, not from a run here
    summary: Summary | None = None
    votes: Votes | None = None


class Folder:
    """The data folder. Methods raise `UserError` where the disk is full or refuses."""

    def __init__(self, root: Path):
        self.root = Path(root)
        self.documents = self.root / "comparisons"
        self.tmp = self.root / "tmp"
        self._purging, self._purged = self.root / "purging", self.root / "purged"

    def create(self) -> None:
        """Make the folders, and remove what killed processes left behind."""
        try:
            for folder in (self.root, self.documents, self.tmp):
                disk.make_folder(folder)
        except OSError as error:
            # A folder that is mounted read-only can still be read.
            if not self.documents.is_dir():
                raise _refused(error, self.root) from error
        self._sweep()

    # ---- documents

    def document_path(self, id: str) -> Path:
        return self.documents / (check_id(id) + _DOCUMENT)

    def sidecar_path(self, id: str) -> Path:
        return self.documents / (check_id(id) + _SIDECAR)

    def read_document(self, id: str, max_bytes: int) -> bytes | None:
        """The document's bytes, or None where there is none. Raises `UserError` over `max_bytes`."""
        return self._read(self.document_path(id), max_bytes)

    def read_sidecar(self, id: str) -> Sidecar | None:
        """The sidecar, or None where there is none. A damaged one counts as none: its document opens, and the next change
        writes a new one."""
        data = self._read(self.sidecar_path(id), MAX_SIDECAR_BYTES)
        try:
            return None if data is None else parse_sidecar(data)
        except UserError as problem:
            log.warning("%s: %s", self.sidecar_path(id).name, problem)
            return None

    def write(self, id: str, document: bytes, sidecar: Sidecar) -> None:
        """Save a new document. When this returns, both files are on the disk; before, there is no document."""
        self._write(self.sidecar_path(id), format_sidecar(sidecar))
        self._write(self.document_path(id), document)

    def write_sidecar(self, id: str, sidecar: Sidecar) -> None:
        """Replace the sidecar."""
        self._write(self.sidecar_path(id), format_sidecar(sidecar))

    def scan(self) -> dict[str, str]:
        """Every document's id → a stamp of its sidecar that changes whenever the sidecar does ("" without one).

        Removes sidecars whose document never came, because the process that saved it was killed in between.
        """
        there: set[str] = set()
        sidecars: dict[str, os.DirEntry] = {}
        for entry in self._entries():
            if entry.name.endswith(_SIDECAR):
                sidecars[entry.name.removesuffix(_SIDECAR)] = entry
            elif entry.name.endswith(_DOCUMENT):
                there.add(entry.name.removesuffix(_DOCUMENT))
        for id in sidecars.keys() - there:
            _remove_if_old(Path(sidecars[id].path))
        return {id: _stamp_of(sidecars[id]) if id in sidecars else "" for id in there if _is_id(id)}

    def sidecar_stamp(self, id: str) -> str:
        """A text that changes whenever the file does; "" without one."""
        return _stamp_of(self.sidecar_path(id))

    def document_stamp(self, id: str) -> str:
        return _stamp_of(self.document_path(id))

    def changed_ns(self) -> int:
        """When a file was last added, replaced or removed; 0 if that cannot be told."""
        try:
            return self.documents.stat().st_mtime_ns
        except OSError:
            return 0

    @contextmanager
    def exclusive(self, timeout_s: float) -> Iterator[None]:
        """Held by one thread of one process: for reading a sidecar, changing it and writing it back.

        Two processes may have different indexes for a moment (one makes a new one), so a lock in the database alone would
        let both in. Raises `UserError` where another process holds it for longer than `timeout_s`.
        """
        from filelock import FileLock, Timeout

        lock = FileLock(self.root / ".lock", timeout=timeout_s, mode=0o600, poll_interval=0.01)
        try:
            lock.acquire()
        except Timeout:
            raise UserError(
                f"Another process has locked {self.root} for too long.", "Try again in a moment."
            ) from None
        except (OSError, NotImplementedError) as error:  # a file system without locks, or read-only
            log.debug("%s cannot be locked: %s", self.root, error)
        try:
            yield
        finally:
            lock.release()

    # ---- removing permanently

    def begin_purge(self, id: str) -> None:
        """Note on the disk that this comparison is being removed. From here on it is not brought back from anywhere."""
        try:
            disk.make_folder(self._purging)
            disk.touch(self._purging / check_id(id))
            (self._purged / id).unlink(missing_ok=True)
        except OSError as error:
            raise _refused(error, self._purging) from error

    def remove(self, id: str) -> None:
        """Remove a document and then its sidecar, as far as they are there."""
        try:
            disk.remove(self.document_path(id))
            disk.remove(self.sidecar_path(id))
        except OSError as error:
            raise _refused(error, self.documents) from error

    def end_purge(self, id: str) -> None:
        """Nothing is left of it, on this disk and elsewhere. The mark stays for a day: another process may just be
        downloading a copy."""
        try:
            disk.make_folder(self._purged)
            disk.rename(self._purging / check_id(id), self._purged / id)
            os.utime(self._purged / id)
        except FileNotFoundError:
            pass  # another process was faster
        except OSError as error:
            raise _refused(error, self._purged) from error

    def purging(self) -> list[str]:
        """Ids whose removal has begun and has not ended."""
        return _ids_in(self._purging)

    def is_removed(self, id: str) -> bool:
        """Whether this comparison is being removed permanently, or was within the last day."""
        return (self._purging / check_id(id)).exists() or (self._purged / id).exists()

    def forget_purged(self, *ids: str) -> None:
        """Drop the marks of removals that ended: of these ids, or without any of those older than a day."""
        for id in ids or _ids_in(self._purged):
            mark = self._purged / check_id(id)
            try:
                if ids or time.time() - mark.stat().st_mtime > _REMEMBERED_S:
                    if not ids:
                        self.remove(id)  # whatever a writer that had not noticed may have put there
                    disk.remove(mark)
            except FileNotFoundError:
                continue  # another process was faster
            except OSError as error:
                raise _refused(error, self._purged) from error

    # ---- the disk

    def _entries(self) -> Iterator[os.DirEntry]:
        try:
            with os.scandir(self.documents) as entries:
                yield from entries
        except FileNotFoundError:
            return

    def _read(self, path: Path, max_bytes: int) -> bytes | None:
        try:
            with path.open("rb") as file:
                data = file.read(max_bytes + 1)  # never more in memory than may be read
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _refused(error, path) from error
        if len(data) > max_bytes:
            raise UserError(
                f"{path.name} is larger than {max_bytes / 1e6:,.0f} MB.",
                "It was not written by this program.",
            )
        return data

    def _write(self, path: Path, data: bytes) -> None:
        part = self.tmp / f"{_this_machine()}~{os.getpid()}~{secrets.token_hex(8)}.part"
        try:
            disk.write(path, data, part=part)
        except OSError as error:
            raise _refused(error, path.parent) from error

    def _sweep(self) -> None:
        """Remove temporary files whose writer is dead: those of a process that is gone, or very old ones."""
        try:
            parts = list(self.tmp.glob("*.part"))
        except OSError:
            return
        for part in parts:
            machine, _, pid = part.name.rpartition("~")[0].rpartition("~")
            if machine == _this_machine() and pid.isdigit() and not _is_alive(int(pid)):
                part.unlink(missing_ok=True)
            else:
                _remove_if_old(part)


def parse_sidecar(data: bytes) -> Sidecar:
    """Sidecar from its JSON. Raises `UserError`: it may have come over the network."""
    broken = UserError(
        "The metadata file of a comparison (.meta.json) is damaged.",
        "Restore it from a copy of the data folder.",
    )
    if len(data) > MAX_SIDECAR_BYTES:
        raise broken
    try:
        return record(Sidecar, json.loads(data))
    except (ValueError, RecursionError):
        raise broken from None


def format_sidecar(sidecar: Sidecar) -> bytes:
    return json.dumps(asdict(sidecar), ensure_ascii=True, indent=1).encode()


def summarize(comparison: Comparison) -> Summary:
    """What the history shows of a comparison."""
    prompt, result = comparison.prompt, comparison.prompt_set
    text = prompt.text
    if result is not None:
        text = "\n".join(
            [
                f"{'Task' if result.task else 'Prompt set'} {result.name} ({len(result.prompts)})",
                *(p.prompt for p in result.prompts[:50]),
            ]
        )
    key = hashlib.sha256(json.dumps([text, prompt.system]).encode())
    return Summary(
        created_at=comparison.created_at[:40],
        model=comparison.model[:MAX_NAME],
        variants=tuple(c.label[:MAX_NAME] for c in comparison.cells[:32]),
        prompt=text[:MAX_EXCERPT],
        prompt_key=key.hexdigest()[:32],
        device=comparison.environment.device[:MAX_NAME] if comparison.environment.device else None,
    )


def _stamp_of(path: Path | os.DirEntry) -> str:
    try:
        stat = path.stat()
    except OSError:
        return ""
    return f"{stat.st_mtime_ns}-{stat.st_size}-{stat.st_ino}"


def _remove_if_old(path: Path) -> None:
    try:
        if time.time() - path.stat().st_mtime > _ABANDONED_S:
            path.unlink()
    except OSError:
        pass  # another process was faster, or the folder is read-only


def stored_bytes(folder: Path) -> int:
    """What the files of a folder take together."""
    total = 0
    try:
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # removed meanwhile
                total += entry.stat().st_size
    except OSError:
        pass
    return total


def _ids_in(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if _is_id(name))
    except OSError:
        return []


def _is_id(text: str) -> bool:
    try:
        check_id(text)
    except UserError:
        return False
    return True


def _this_machine() -> str:
    return "".join(c if c.isalnum() else "-" for c in socket.gethostname())[:60]


def _is_alive(pid: int) -> bool:
    if os.name != "posix":  # where signal 0 is not a question but a blow
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _refused(error: OSError, path: Path) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return UserError(
            f"The disk is full: the comparison could not be saved to {path}.",
            "Free some space there, or set COMPARATOR_DATA_DIR to a folder on another disk. No partly written file was "
            "kept; the comparison on the page can still be downloaded.",
        )
    return UserError(
        f"{path} cannot be used: {error.strerror or error}.",
        "Check the folder's permissions, or set COMPARATOR_DATA_DIR to another one.",
    )
