"""The index's schema as numbered steps, and the ledger that says which ones a database has seen.

To change the schema, append a function; leave the old ones alone. Steps only add (tables, columns with a default,
indexes), so that an older version of the program can go on using a database that a newer one has migrated: several
may share a data folder. Every value can be made again from the documents and sidecars, so a step may leave what it
adds empty and spoil `stamp`, which has those rows read again. Knows nothing of what the columns are used for.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from datetime import UTC, datetime

Migration = Callable[[sqlite3.Connection], None]


def m001_comparisons(db: sqlite3.Connection) -> None:
    db.execute(
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
            imported INTEGER NOT NULL
        ) WITHOUT ROWID
        """
    )
    db.execute("CREATE INDEX by_date ON comparisons (saved_at DESC, id)")
    db.execute("CREATE INDEX by_owner ON comparisons (owner, saved_at DESC, id)")


def m002_search_text(db: sqlite3.Connection) -> None:
    """What a search looks through, case folded, apart from the rows that a list shows: those stay short."""
    db.execute("CREATE TABLE search (id TEXT PRIMARY KEY, text TEXT NOT NULL)")
    db.execute("UPDATE comparisons SET stamp = 'stale'")


def m003_same_prompt(db: sqlite3.Connection) -> None:
    """Comparisons of one prompt on other machines, to be laid side by side."""
    db.execute("ALTER TABLE comparisons ADD COLUMN prompt_key TEXT NOT NULL DEFAULT ''")
    db.execute("ALTER TABLE comparisons ADD COLUMN device TEXT")
    db.execute("CREATE INDEX by_prompt ON comparisons (prompt_key)")
    db.execute("UPDATE comparisons SET stamp = 'stale'")


MIGRATIONS: tuple[Migration, ...] = (m001_comparisons, m002_search_text, m003_same_prompt)


def applied(db: sqlite3.Connection) -> set[int]:
    """Numbers of the steps this database has seen, counted from 1."""
    db.execute(
        "CREATE TABLE IF NOT EXISTS migrations (number INTEGER PRIMARY KEY, name TEXT NOT NULL, applied_at TEXT NOT NULL)"
    )
    return {number for (number,) in db.execute("SELECT number FROM migrations")}


def migrate(db: sqlite3.Connection, migrations: tuple[Migration, ...] = MIGRATIONS) -> list[int]:
    """Take the steps that are missing, each in a transaction of its own; returns their numbers.

    `db` must be in autocommit mode (`isolation_level=None`). Safe when several processes do it at once: the ledger
    is read again after the write lock is held.
    """
    if set(range(1, len(migrations) + 1)) <= _seen(db):
        return []
    taken = []
    for number, step in enumerate(migrations, start=1):
        db.execute("BEGIN IMMEDIATE")
        try:
            if number not in applied(db):
                step(db)
                db.execute(
                    "INSERT INTO migrations VALUES (?, ?, ?)",
                    (number, step.__name__, datetime.now(UTC).isoformat(timespec="seconds")),
                )
                taken.append(number)
            db.execute("COMMIT")
        except BaseException:
            db.execute("ROLLBACK")
            raise
    return taken


def _seen(db: sqlite3.Connection) -> set[int]:
    """Like `applied`, without writing."""
    if not db.execute("SELECT 1 FROM sqlite_master WHERE name = 'migrations'").fetchone():
        return set()
    return applied(db)
