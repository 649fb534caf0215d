"""Deleted is deleted: which comparisons are removed permanently, and the thread that does it.

Deleting a comparison only marks its sidecar, so that it can be brought back. It is removed permanently

- COMPARATOR_PURGE_DAYS after it was deleted,
- in public mode COMPARATOR_RETENTION_DAYS after it was saved, unless its owner gave it a name,
- or by `python -m comparator purge`.

`Store.purge` removes one. Ages are read from the index; whether one is due is judged again by its sidecar, since its
owner may bring it back at any moment.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from comparator.core.errors import UserError
from comparator.store.files import Sidecar

if TYPE_CHECKING:
    from comparator.store.store import Store

EVERY_S = 3600.0  # a server that runs for months looks again this often

log = logging.getLogger(__name__)


def is_due(
    deleted_at: str | None,
    saved_at: str,
    name: str,
    *,
    purge_days: float | None,
    retention_days: float | None = None,
    now: datetime | None = None,
) -> bool:
    """Whether a comparison is removed permanently now.

    Args:
        deleted_at, saved_at: Times in ISO 8601; one that cannot be read never makes a comparison due.
        name: What its owner called it, or "".
        purge_days: Days after deletion; None: deleted ones stay.
        retention_days: Days after saving for those without a name; None: they stay.
        now: The time to judge by.
    """
    now = now or datetime.now(UTC)
    if deleted_at is not None:
        return purge_days is not None and _older(deleted_at, purge_days, now)
    return retention_days is not None and not name and _older(saved_at, retention_days, now)


def due(
    store: Store,
    *,
    purge_days: float | None,
    retention_days: float | None = None,
    now: datetime | None = None,
) -> list[str]:
    """Ids of the comparisons that are due, unfinished removals first."""
    ages = {"purge_days": purge_days, "retention_days": retention_days, "now": now}
    found = [id for id, saved, deleted, name in store.ages() if is_due(deleted, saved, name, **ages)]
    return list(dict.fromkeys([*unfinished(store), *found]))


def unfinished(store: Store) -> list[str]:
    """Removals that were interrupted on this disk; those that only wait for the Hub are not among them."""
    folder = store.folder
    return [
        id
        for id in folder.purging()
        if store.remote is None or folder.document_path(id).exists() or folder.sidecar_path(id).exists()
    ]


def purge(store: Store, ids: Iterable[str], is_due: Callable[[Sidecar], bool]) -> list[str]:
    """Remove these permanently as far as `is_due` says so; returns those removed. Raises `UserError` if the disk refuses."""
    removed = [id for id in ids if store.purge(id, is_due)]
    if removed:
        store.scrub()
    return removed


class Cleaner:
    """The thread that removes what is due: at the start, after each deletion and once an hour. Requests never wait for it."""

    def __init__(self, store: Store, purge_days: int, retention_days: int):
        """0 days: never. Retention applies in public mode only."""
        self.store = store
        self.ages = {
            "purge_days": purge_days or None,
            "retention_days": (retention_days or None) if store.public else None,
        }
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._work, name="purge", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5.0)

    def clean(self, now: datetime | None = None) -> list[str]:
        """Remove what is due at `now`; returns the ids."""
        self.store.folder.forget_purged()
        removed = []
        for id in due(self.store, **self.ages, now=now):
            if self._stop.is_set():
                break
            removed += purge(self.store, [id], lambda s: self._is_due(s, now))
        return removed

    def _is_due(self, sidecar: Sidecar, now: datetime | None) -> bool:
        return is_due(sidecar.deleted_at, sidecar.saved_at, sidecar.name, **self.ages, now=now)

    def _work(self) -> None:
        while not self._stop.is_set():
            self._wake.clear()
            try:
                if removed := self.clean():
                    log.info("%d comparisons were removed permanently.", len(removed))
            except UserError as problem:
                log.warning("Deleted comparisons could not be removed yet: %s", problem)
            except Exception:
                log.exception("Deleted comparisons could not be removed yet")
            self._wake.wait(EVERY_S)


def _older(when: str, days: float, now: datetime) -> bool:
    try:
        then = datetime.fromisoformat(when)
        return now - (then if then.tzinfo else then.replace(tzinfo=UTC)) >= timedelta(days=days)
    except (ValueError, OverflowError):
        return False
