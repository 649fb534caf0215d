"""The history's index: SQLite made from the data folder, and made again whenever it is missing, stale or broken.

Nothing is kept here alone. Each row carries a stamp of the sidecar it was made from, so opening the index compares
two lists and reads only what changed: what a killed process, another machine or a restored backup put into the
folder is found. Several processes use one index at once (WAL, with a long busy timeout).

The file's name has the time it was made in it: a broken index is left behind under its old name and a new one begun
beside it, because taking a database file away from under another process can spoil the one put in its place.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import sqlite3
import tempfile
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from comparator.core.errors import UserError
from comparator.store.files import Folder, Sidecar, Summary
from comparator.store.schema import create_tables, transaction

T = TypeVar("T")

MAX_TERMS = 16
MAX_TERM = 200
MAX_PAGE = 500  # entries one search returns at most
EXCERPT = 300  # characters of the prompt in a list
_BUSY_S = 15.0
_RECHECK_S = 30.0  # the folder is compared again at most this often
_TICK_NS = 2 * 10**9  # the coarsest clock of a file system
_COLUMNS = (
    "id, saved_at, created_at, deleted_at, name, model, variants, prompt, prompt_key, device, imported, owner"
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """One line of the history."""

    id: str
    saved_at: str  # UTC, ISO 8601; lists are sorted by it, newest first
    created_at: str  # when it was measured; of an imported document, as that says
    model: str
    variants: tuple[str, ...]  # the columns' labels
    prompt: str  # its first 300 characters
    prompt_key: str  # equal for comparisons of the same prompt and system prompt
    name: str = ""
    device: str | None = None
    imported: bool = False
    deleted_at: str | None = None
    owner: str | None = None  # a digest


_INDEX_NAME = re.compile(r"index-\d{1,30}-[^-]*\.sqlite3")


class Index:
    """Rows about saved comparisons. Methods may be called from any thread."""

    def __init__(self, folder: Folder, directory: Path, read_summary: Callable[[str], Summary]):
        """`read_summary` opens a document; called only for those whose sidecar has no summary."""
        self.folder = folder
        self.directory = directory
        self._read_summary = read_summary
        self._lock = threading.RLock()
        self._db: sqlite3.Connection | None = None
        self._path: Path | None = None
        self._pid = 0
        self._begin_anew = False
        self._compared_s = 0.0
        self._compared_ns = -1
        self._broken: set[str] = set()  # documents that cannot be read; told once

    # ---- questions

    def search(
        self, query: str, owner: str | None, limit: int, offset: int, *, deleted: bool = False
    ) -> list[Entry]:
        """Newest first. `owner` None: everybody's. Every word of `query` has to occur somewhere in an entry."""
        where, values = _where(query, owner, deleted)
        values += [max(0, min(int(limit), MAX_PAGE)), max(0, min(int(offset), 2**31))]
        sql = (
            f"SELECT {_COLUMNS} FROM comparisons c WHERE {where} ORDER BY saved_at DESC, id LIMIT ? OFFSET ?"
        )
        return [_entry(row) for row in self._run(lambda db: db.execute(sql, values).fetchall(), fresh=True)]

    def count(self, query: str, owner: str | None, *, deleted: bool = False) -> int:
        where, values = _where(query, owner, deleted)
        sql = f"SELECT count(*) FROM comparisons c WHERE {where}"
        return self._run(lambda db: db.execute(sql, values).fetchone()[0], fresh=True)

    def same_prompt(self, key: str, owner: str | None, limit: int) -> list[Entry]:
        """Comparisons of one prompt, newest first."""
        sql = (
            f"SELECT {_COLUMNS} FROM comparisons c WHERE prompt_key = ? AND deleted_at IS NULL "
            f"{'AND owner = ?' if owner is not None else ''} ORDER BY saved_at DESC, id LIMIT ?"
        )
        values = [key, *([owner] if owner is not None else []), max(0, min(int(limit), MAX_PAGE))]
        return [_entry(row) for row in self._run(lambda db: db.execute(sql, values).fetchall(), fresh=True)]

    # ---- changes

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held by one thread of one process: for reading a sidecar, changing it and writing it back."""
        with self._lock, self.folder.exclusive(_BUSY_S):
            self._run(lambda db: db.execute("BEGIN IMMEDIATE"))
            db = self._db
            try:
                yield
            finally:
                try:
                    if db is not None and db.in_transaction:
                        db.execute("COMMIT")
                except sqlite3.Error as error:  # the files are written; the row is made again from them
                    log.warning("The history's index missed a change: %s", error)

    def put(self, id: str, sidecar: Sidecar) -> None:
        """Add or replace the row of a document."""
        self._run(lambda db: self._put(db, id, sidecar, self.folder.sidecar_stamp(id)))

    def remove(self, id: str) -> None:
        """Remove the row of a document, and what a search looks through."""

        def work(db: sqlite3.Connection) -> None:
            with transaction(db):
                db.execute("DELETE FROM comparisons WHERE id = ?", (id,))
                db.execute("DELETE FROM search WHERE id = ?", (id,))

        self._run(work)

    def ages(self) -> list[tuple[str, str, str | None, str]]:
        """Of every comparison its id, `saved_at`, `deleted_at` and name."""
        sql = "SELECT id, saved_at, deleted_at, name FROM comparisons"
        return self._run(lambda db: db.execute(sql).fetchall(), fresh=True)

    def scrub(self) -> None:
        """Empty the database's log, in which the text of removed rows would stay until it is written over."""
        self._run(lambda db: db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())

    def rebuild(self) -> int:
        """Make every row again from the folder; returns how many there are."""

        with self._lock:
            self._broken.clear()
            self._begin_anew = True
            return self._run(lambda db: db.execute("SELECT count(*) FROM comparisons").fetchone()[0])

    def close(self) -> None:
        with self._lock:
            # After a fork the parent's connection must not be touched, not even to close it.
            if self._db is not None and self._pid == os.getpid():
                self._db.close()
            self._db = None

    # ---- the database

    def _run(self, work: Callable[[sqlite3.Connection], T], *, fresh: bool = False) -> T:
        """Do `work` on the current database. A broken one is replaced, and the work done again on the new one."""
        with self._lock:
            for attempt in range(3):
                try:
                    db = self._open()
                    if fresh:
                        self._compare_if_stale(db)
                    return work(db)
                except sqlite3.Error as error:
                    if attempt == 2 or _is_busy(error):
                        raise UserError(
                            f"The history's index cannot be used: {error}.",
                            "Try again in a moment. Links work without it; python -m comparator reindex rebuilds it.",
                        ) from error
                    self._abandon(error, again=attempt > 0)
        raise AssertionError("unreachable")

    def _open(self) -> sqlite3.Connection:
        newest = None if self._begin_anew else self._newest()
        if self._db is not None and self._pid == os.getpid() and newest == self._path:
            return self._db
        self.close()
        if newest is None:
            last = self._newest()  # above it also where the clock went back
            number = max(time.time_ns(), int(last.name.split("-")[1]) + 1 if last else 0)
            newest = self.directory / f"index-{number:020d}-{secrets.token_hex(4)}.sqlite3"
        self._path = newest
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise _NoFolder(f"{self.directory}: {error.strerror}") from error
        db = sqlite3.connect(newest, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            _use_wal(db)
            # A row lost to a power cut is found again by the next opening.
            db.execute("PRAGMA synchronous = NORMAL")
            db.execute("PRAGMA secure_delete = ON")  # what is removed is overwritten, not only marked as free
            create_tables(db)
            self._compare(db)
        except BaseException:
            db.close()
            raise
        self._db, self._pid, self._begin_anew = db, os.getpid(), False
        self._remove_older(newest)
        return db

    def _newest(self) -> Path | None:
        try:
            names = [n for n in os.listdir(self.directory) if _INDEX_NAME.fullmatch(n)]
        except OSError:
            return None
        return self.directory / max(names) if names else None

    def _abandon(self, error: sqlite3.Error, *, again: bool) -> None:
        """Start over next to a broken index; in a temporary folder where this one cannot hold a database."""
        log.warning("The history's index is rebuilt: %s", error)
        try:
            self.close()
        except sqlite3.Error:
            self._db = None
        if self._path is not None:
            _remove(self._path)
        self._begin_anew = True
        if again and _is_the_folders_fault(error):
            self.directory = Path(tempfile.mkdtemp(prefix="quant-comparator-index-"))

    def _remove_older(self, newest: Path) -> None:
        for path in self.directory.glob("index-*.sqlite3"):
            if path.name < newest.name:
                _remove(path)

    # ---- folder → rows

    def _compare_if_stale(self, db: sqlite3.Connection) -> None:
        if (
            time.monotonic() - self._compared_s > _RECHECK_S
            and self.folder.changed_ns() != self._compared_ns
            and not db.in_transaction
        ):
            self._compare(db)

    def _compare(self, db: sqlite3.Connection) -> None:
        """Read what the folder has and the rows have not, or have differently; drop rows without a document."""
        changed_ns = self.folder.changed_ns()
        rows = dict(db.execute("SELECT id, stamp FROM comparisons"))  # before the folder: see `gone`
        there = self.folder.scan()
        stale = [id for id, stamp in there.items() if rows.get(id) != stamp and id not in self._broken]
        gone = [id for id in rows if id not in there]  # one saved meanwhile was not among the rows
        for start in range(0, len(stale), 500):
            read = [(id, found) for id in stale[start : start + 500] if (found := self._read(id))]
            with transaction(db):
                for id, (sidecar, stamp) in read:
                    self._put(db, id, sidecar, stamp)
        if gone:
            with transaction(db):
                db.executemany("DELETE FROM comparisons WHERE id = ?", [(id,) for id in gone])
                db.executemany("DELETE FROM search WHERE id = ?", [(id,) for id in gone])
        # A change within the same tick of the clock would leave the folder's time as it is.
        settled = time.time_ns() - changed_ns > _TICK_NS
        self._compared_s, self._compared_ns = time.monotonic(), changed_ns if settled else -1

    def _read(self, id: str) -> tuple[Sidecar, str] | None:
        """The sidecar with a summary, and its stamp; None for a document that cannot be read."""
        # Before the content: changed in between, it is read again next time.
        stamp = self.folder.sidecar_stamp(id)
        try:
            sidecar = self.folder.read_sidecar(id)
            if sidecar is None or sidecar.summary is None:
                summary = self._read_summary(id)
                sidecar = replace(sidecar or Sidecar(None, summary.created_at), summary=summary)
        except UserError as problem:
            self._broken.add(id)
            log.warning("The history omits %s: %s", id, problem)
            return None
        return sidecar, stamp

    def _put(self, db: sqlite3.Connection, id: str, sidecar: Sidecar, stamp: str) -> None:
        summary = sidecar.summary
        assert summary is not None
        row = {
            "id": id, "stamp": stamp, "owner": sidecar.owner, "saved_at": sidecar.saved_at,
            "created_at": summary.created_at, "deleted_at": sidecar.deleted_at, "name": sidecar.name,
            "model": summary.model, "variants": json.dumps(summary.variants), "prompt": summary.prompt[:EXCERPT],
            "prompt_key": summary.prompt_key, "device": summary.device, "imported": int(sidecar.imported),
        }  # fmt: skip
        row = {key: _text(value) if isinstance(value, str) else value for key, value in row.items()}
        words = [
            sidecar.name,
            summary.model,
            *summary.variants,
            summary.device or "",
            summary.created_at[:10],
            id,
        ]
        with transaction(db):
            db.execute(
                f"INSERT OR REPLACE INTO comparisons ({', '.join(row)}) VALUES ({', '.join(':' + k for k in row)})",
                row,
            )
            db.execute(
                "INSERT OR REPLACE INTO search (id, text) VALUES (?, ?)",
                (id, fold("\n".join([*words, summary.prompt]))),
            )


def fold(text: str) -> str:
    """Text as it is compared in a search: upper and lower case, full and half width are the same."""
    return unicodedata.normalize("NFKC", _text(text)).casefold()


def _text(text: str) -> str:
    """Without lone surrogates, which no file and no database takes."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _where(query: str, owner: str | None, deleted: bool) -> tuple[str, list]:
    """The condition and its values. Words are compared as they stand: nothing in them is a pattern or SQL."""
    parts = ["deleted_at IS NOT NULL" if deleted else "deleted_at IS NULL"]
    values: list = []
    if owner is not None:
        parts.append("owner = ?")
        values.append(owner)
    terms = fold(query[: MAX_TERMS * MAX_TERM]).split()[:MAX_TERMS]
    if terms:
        found = " AND ".join("instr(s.text, ?) > 0" for _ in terms)
        parts.append(f"EXISTS (SELECT 1 FROM search s WHERE s.id = c.id AND {found})")
        values += [term[:MAX_TERM] for term in terms]
    return " AND ".join(parts), values


def _entry(row: tuple) -> Entry:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    values["variants"] = tuple(json.loads(values["variants"]))
    values["imported"] = bool(values["imported"])
    return Entry(**values)


class _NoFolder(sqlite3.OperationalError):
    """The folder for the index cannot be made."""


def _use_wal(db: sqlite3.Connection) -> None:
    """Readers and a writer at once. Switching a new file over does not wait for a lock by itself, so wait here."""
    end_s = time.monotonic() + _BUSY_S
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > end_s:
                raise
            time.sleep(0.02)


def _remove(path: Path) -> None:
    for end in ("", "-wal", "-shm", "-journal"):
        try:
            Path(f"{path}{end}").unlink(missing_ok=True)
        except OSError:
            continue  # a read-only folder: an older index in it does no harm


def _code(error: sqlite3.Error) -> int:
    return (getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR) & 0xFF


def _is_busy(error: sqlite3.Error) -> bool:
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL)


def _is_the_folders_fault(error: sqlite3.Error) -> bool:
    """Read-only, or a file system that cannot hold a database (some network and bucket mounts)."""
    return isinstance(error, _NoFolder) or _code(error) in (
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOLFS,
    )
