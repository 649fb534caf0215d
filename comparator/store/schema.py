"""The tables of the history's index. `PRAGMA user_version` says which version of them a database has."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

# An index of another version is made again from the documents: raise it with every change of the tables.
VERSION = 4
_TABLES = (
    """
    CREATE TABLE comparisons (
        id TEXT PRIMARY KEY,
        stamp TEXT NOT NULL,        -- of the sidecar this row was made from
        owner TEXT,
        saved_at TEXT NOT NULL,
        created_at TEXT NOT NULL,
        deleted_at TEXT,
        name TEXT NOT NULL,
        model TEXT NOT NULL,
        variants TEXT NOT NULL,     -- a JSON list
        prompt TEXT NOT NULL,
        prompt_key TEXT NOT NULL,
        device TEXT,
        imported INTEGER NOT NULL
    ) WITHOUT ROWID
    """,
    "CREATE INDEX by_date ON comparisons (saved_at DESC, id)",
    "CREATE INDEX by_owner ON comparisons (owner, saved_at DESC, id)",
    "CREATE INDEX by_prompt ON comparisons (prompt_key)",
    # What a search looks through, case folded, apart from the rows that a list shows: those stay short.
    "CREATE TABLE search (id TEXT PRIMARY KEY, text TEXT NOT NULL)",
)


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """All or nothing; inside another transaction it is part of that one."""
    if db.in_transaction:
        yield
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def create_tables(db: sqlite3.Connection) -> None:
    """The tables of a new index. Raises `sqlite3.DatabaseError` for one that another version of the program made."""

    def version() -> int:
        return db.execute("PRAGMA user_version").fetchone()[0]

    if version() == VERSION:
        return
    with transaction(db):
        if version() == VERSION:  # another process was faster
            return
        if db.execute("SELECT 1 FROM sqlite_master").fetchone():
            raise sqlite3.DatabaseError(f"it is of version {version()}, not {VERSION}")
        for statement in _TABLES:
            db.execute(statement)
        db.execute(f"PRAGMA user_version = {VERSION}")
