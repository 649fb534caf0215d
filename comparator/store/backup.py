"""Everything that cannot be made again, as one .tar.gz, and back.

    quant-comparator-backup.json          what this archive is
    comparisons/ID.meta.json, ID.json     each sidecar directly before its document
    adapters/NAME/FILE, trainings/NAME/FILE

Caches are left out, and the index too: it is made from the documents. An archive that is restored may come from
anybody. Its headers are read first, and one that this program does not write (a path that leaves the folder, a link, a
device, a size that cannot be) refuses the whole archive before anything is written. Then each document is checked as an
import is. Nothing that is there is overwritten.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import re
import secrets
import shutil
import tarfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from comparator.core.errors import UserError
from comparator.store.files import MAX_SIDECAR_BYTES
from comparator.store.links import BadId, check_id
from comparator.util import atomic_dir, disk

if TYPE_CHECKING:
    from comparator.store.store import Store

MANIFEST = "quant-comparator-backup.json"
FORMAT = 1
MAX_MEMBERS = 500_000
MAX_FILE_BYTES = 8 * 2**30  # of an adapter or a run; a ustar header holds no more
MAX_DOCUMENT_BYTES = 256_000_000  # what the store itself writes at most
MAX_JSON_BYTES = 16_000_000
MAX_RATIO = 200  # unpacked over packed: documents pack some 5 to 20 times
_SMALL_BYTES = 64_000_000  # an archive may always unpack to this
_SPARE_BYTES = 64_000_000  # left free on the disk
_ABANDONED_S = 86_400.0
_CHUNK = 65_536
_HEADER_BYTES = 4 * _CHUNK  # what one header may take with its extensions
_FOLDER = re.compile(r"[A-Za-z0-9][\w.-]{0,63}", re.ASCII)  # as `training/validation.py` has names

Kinds = Mapping[str, Sequence[str]]  # folder of the data folder → files that are kept of each folder in it


@dataclass
class Report:
    """What a backup or a restore did."""

    comparisons: int = 0
    folders: dict[str, int] = field(default_factory=dict)  # "adapters" → how many
    there: list[str] = field(default_factory=list)  # left alone, since it is there already
    refused: list[tuple[str, str]] = field(default_factory=list)  # name and reason


# ---------------------------------------------------------------- backup


def write(store: Store, kinds: Kinds, file: Path) -> Report:
    """Write the archive `file`, which only its owner can read; whole or not at all. Raises `UserError`."""
    if file.exists():
        raise UserError(f"{file} already exists.", "Choose another name: nothing is overwritten.")
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    report = Report()
    try:
        with open(part, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as raw:
            with (
                gzip.GzipFile(fileobj=raw, mode="wb", filename="", compresslevel=6) as packed,
                tarfile.open(fileobj=packed, mode="w:", format=tarfile.USTAR_FORMAT) as archive,
            ):
                _add(archive, MANIFEST, io.BytesIO(json.dumps({"format": FORMAT}).encode()))
                for id in sorted(store.folder.scan()):
                    report.comparisons += _add_comparison(archive, store, id)
                for kind, names in kinds.items():
                    report.folders[kind] = sum(
                        _add_folder(archive, f"{kind}/{folder.name}", folder, names)
                        for folder in _folders(store.folder.root / kind)
                    )
        disk.flush_file(part)
        disk.rename(part, file)
    except OSError as error:
        raise UserError(
            f"The backup cannot be written to {file}: {error.strerror or error}.",
            "Choose a writable folder, on a disk with enough free space.",
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return report


def _add_comparison(archive: tarfile.TarFile, store: Store, id: str) -> bool:
    folder = store.folder
    with contextlib.ExitStack() as opened:
        try:
            document = opened.enter_context(folder.document_path(id).open("rb"))
        except FileNotFoundError:
            return False  # purged meanwhile
        with contextlib.suppress(FileNotFoundError):
            side = opened.enter_context(folder.sidecar_path(id).open("rb"))
            _add(archive, f"comparisons/{id}.meta.json", side)
        _add(archive, f"comparisons/{id}.json", document)
    return True


def _folders(parent: Path) -> list[Path]:
    try:
        return sorted(path for path in parent.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir())
    except OSError:
        return []


def _add_folder(archive: tarfile.TarFile, name: str, folder: Path, files: Sequence[str]) -> bool:
    added = False
    for file in files:
        if (folder / file).is_file():
            with (folder / file).open("rb") as content:
                _add(archive, f"{name}/{file}", content)
            added = True
    return added


def _add(archive: tarfile.TarFile, name: str, content: io.BufferedIOBase) -> None:
    member = tarfile.TarInfo(name)
    member.size = content.seek(0, os.SEEK_END)
    content.seek(0)
    member.mode = 0o600
    archive.addfile(member, content)


# ---------------------------------------------------------------- restore


def restore(store: Store, kinds: Kinds, file: Path) -> Report:
    """Bring back what `file` has and the store has not. Raises `UserError` for an archive that `write` did not make.

    What is wrong with a single document or adapter is in the report's `refused`; the others are restored.
    """
    with _reading(file):
        _check_headers(file, kinds, shutil.disk_usage(store.folder.root).free)
        return _Restoring(store, kinds).run(file)


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, RecursionError, ValueError) as error:
        raise UserError(
            f"{file} is damaged, or not a backup: {str(error)[:200]}", "Use another copy."
        ) from None
    except OSError as error:
        raise UserError(
            f"{error.filename or file}: {error.strerror or error}.",
            "Check the file, the folder and the disk.",
        ) from error


def _members(file: Path) -> Iterator[tuple[tarfile.TarInfo, _Bounded]]:
    """Every member with the stream that stands at its content."""
    with file.open("rb") as raw, gzip.GzipFile(fileobj=raw) as unpacked:
        stream = _Bounded(unpacked)
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for _ in range(MAX_MEMBERS):
                stream.left = _HEADER_BYTES
                member = archive.next()
                if member is None:
                    return
                archive.members.clear()  # it would keep them all
                yield member, stream
    raise ValueError(f"it has more than {MAX_MEMBERS:,} members")


class _Bounded:
    """What `tarfile` reads from. A header's extensions are as long as they say themselves, and would be read whole."""

    def __init__(self, file: gzip.GzipFile):
        self._file = file
        self.left = _HEADER_BYTES

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.left:
            raise ValueError("a header in it is too long")
        self.left -= size
        return self._file.read(size)

    def seek(self, position: int) -> int:
        if (
            position < self._file.tell()
        ):  # backwards is from the beginning, and without end where a size is negative
            raise ValueError("a size in it is wrong")
        return self._file.seek(position)

    def tell(self) -> int:
        return self._file.tell()

    def content(self, member: tarfile.TarInfo) -> Iterator[bytes]:
        left = member.size
        while left:
            data = self._file.read(min(left, _CHUNK))
            if not data:
                raise EOFError("it is cut off")
            left -= len(data)
            yield data


def _check_headers(file: Path, kinds: Kinds, free_bytes: int) -> None:
    """Raises `UserError` for a member that `write` would not have written, before anything is."""
    total, packed, first = 0, file.stat().st_size, True
    for member, stream in _members(file):
        if first:
            _check_manifest(file, member, stream)
            first = False
            continue
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
            raise _hostile(member.name, "is a link, a device or something else that is not a plain file")
        _, _, most = _place(member.name, kinds)
        if not 0 <= member.size <= most:
            raise _hostile(member.name, f"has {member.size:,} bytes")
        total += member.size
        if total > max(_SMALL_BYTES, packed * MAX_RATIO):
            raise _hostile(member.name, f"makes it unpack to more than {MAX_RATIO} times its size")
        if total > free_bytes - _SPARE_BYTES:
            raise UserError(
                f"{file} unpacks to more than the {free_bytes / 1e6:,.0f} MB that are free.",
                "Free some space there.",
            )
    if first:
        raise UserError(f"{file} is empty.", "Use another copy.")


def _check_manifest(file: Path, member: tarfile.TarInfo, stream: _Bounded) -> None:
    if member.name != MANIFEST or member.type != tarfile.REGTYPE or not 0 < member.size <= _CHUNK:
        raise UserError(
            f"{file} was not made by `python -m comparator backup`.",
            "Only files written by that command can be restored.",
        )
    try:
        made = json.loads(b"".join(stream.content(member)))["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        made = None
    if made != FORMAT:
        raise UserError(
            f"{file} has format {str(made)[:20]}; this release reads {FORMAT}.",
            "Restore it with a newer release.",
        )


def _place(name: str, kinds: Kinds) -> tuple[str, str, int]:
    """A member's kind, its id or folder, and the most bytes it may have. Raises `UserError` for any other name."""
    parts = name.split("/")
    if parts[0] == "comparisons" and len(parts) == 2 and parts[1].endswith(".json"):
        is_side = parts[1].endswith(".meta.json")
        try:
            id = check_id(parts[1].removesuffix(".meta.json" if is_side else ".json"))
        except BadId:
            raise _hostile(name, "is not named after a comparison") from None
        return ("sidecar", id, MAX_SIDECAR_BYTES) if is_side else ("document", id, MAX_DOCUMENT_BYTES)
    if len(parts) == 3 and parts[2] in kinds.get(parts[0], ()) and _FOLDER.fullmatch(parts[1]):
        return parts[0], parts[1], MAX_JSON_BYTES if parts[2].endswith(".json") else MAX_FILE_BYTES
    raise _hostile(name, "has a name that does not occur in a backup")


def _hostile(name: str, why: str) -> UserError:
    return UserError(
        f"The archive's member “{name[:100]}” {why}, so nothing was restored.",
        "It was changed, or made by another program.",
    )


class _Restoring:
    """The second reading, which writes."""

    def __init__(self, store: Store, kinds: Kinds):
        self.store, self.kinds = store, kinds
        self.report = Report(folders=dict.fromkeys(kinds, 0))
        self._side: tuple[str, bytes] | None = None  # of the document that comes next
        self._spool = store.folder.tmp / f"restore-{os.getpid()}-{secrets.token_hex(4)}"

    def run(self, file: Path) -> Report:
        for left in self._spool.parent.glob("restore-*"):  # by a process that was killed
            if time.time() - left.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(left, ignore_errors=True)
        try:
            for member, stream in _members(file):
                if member.name == MANIFEST:
                    continue
                kind, name, _ = _place(member.name, self.kinds)
                if kind == "sidecar":
                    self._side = name, b"".join(stream.content(member))
                elif kind == "document":
                    self._document(name, member, stream)
                else:
                    self._spooled(member, stream)
            for kind in self.kinds:
                for folder in _folders(self._spool / kind):
                    self._put_in_place(kind, folder)
        finally:
            shutil.rmtree(self._spool, ignore_errors=True)
        return self.report

    def _document(self, id: str, member: tarfile.TarInfo, stream: _Bounded) -> None:
        side, self._side = self._side, None
        store, folder = self.store, self.store.folder
        if folder.document_path(id).exists():
            self.report.there.append(id)
            return
        if member.size > store.upload_bytes:
            why = f"It has {member.size / 1e6:,.0f} MB; raise COMPARATOR_MAX_UPLOAD to restore it."
            self.report.refused.append((id, why))
            return
        if id in folder.purging():
            self.report.refused.append((id, "It is being removed permanently right now; try again later."))
            return
        try:
            folder.forget_purged(id)  # whoever restores a backup wants back what was removed since
            if store.remote is not None:
                store.remote.mark(id)
            store.adopt(id, b"".join(stream.content(member)), side[1] if side and side[0] == id else None)
            self.report.comparisons += 1
        except UserError as problem:
            self.report.refused.append((id, problem.problem))

    def _spooled(self, member: tarfile.TarInfo, stream: _Bounded) -> None:
        path = self._spool / member.name
        for folder in (self._spool, path.parent.parent, path.parent):
            folder.mkdir(mode=0o700, exist_ok=True)
        with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            for data in stream.content(member):
                file.write(data)

    def _put_in_place(self, kind: str, folder: Path) -> None:
        target = self.store.folder.root / kind / folder.name
        name = f"{kind}/{folder.name}"
        if target.exists() or target.is_symlink():
            self.report.there.append(name)
            return
        try:
            for file in folder.iterdir():
                _check_file(file)
        except UserError as problem:
            self.report.refused.append((name, problem.problem))
            return
        disk.make_folder(target.parent)
        atomic_dir.commit(folder, target)
        self.report.folders[kind] += 1


def _check_file(file: Path) -> None:
    """Raises `UserError` for weights or JSON that cannot be read; what the JSON says is judged by whoever uses it."""
    if file.suffix == ".safetensors":
        from comparator.sources.safetensors_header import read_header

        read_header(file)
    elif file.suffix == ".json":
        try:
            json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            raise UserError(f"{file.name} is not JSON.", "") from None
