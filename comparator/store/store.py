"""Saved comparisons: save, open, find, name, delete. The page and the command line use this.

    with open_store() as store:
        id = store.save(comparison, owner)      # from here on /?c=ID opens it, whatever happens to this process
        store.load(id)                          # on any machine that has the document; no model, no GPU
        store.search("france nf4", owner, limit=50, offset=0)

Whoever has a link may open it: ids cannot be guessed. Listing, naming and deleting are the owner's. An owner is any
text that only that visitor knows (the page keeps one in the browser); only its digest is kept. On a machine of one's
own (not in public mode) everything belongs to whoever is there, and `owner` may be None.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.result import Comparison
from comparator.core.settings import Settings, get_settings
from comparator.store.files import MAX_NAME, Folder, Sidecar, Summary, parse_sidecar, summarize
from comparator.store.index import Entry, Index
from comparator.store.links import BadId, check_id, new_id
from comparator.store.owner import digest, owned
from comparator.store.problems import Deleted, NotFound, NotYours
from comparator.store.voting import attached, separated
from comparator.util.budget import Budget

if TYPE_CHECKING:
    from collections.abc import Callable

    from comparator.store.hub_mirror import Remote
    from comparator.store.purge import Cleaner

OWN_DOCUMENT_BYTES = 256_000_000  # what we wrote ourselves may be larger than what is taken from strangers
RECENT, RECENT_BYTES = 8, 8_000_000  # documents kept parsed; as objects they take some ten times their bytes
# Reading a document holds all threads (0.3 s for each MB on two busy cores). One of a run has some 0.1 to 1 MB.
LARGE_BYTES, LARGE_PER_MINUTE = 2_000_000, 40_000_000
_AGAIN = "Ask for a new link, or run the comparison here."

log = logging.getLogger(__name__)


def open_store(settings: Settings | None = None) -> Store:
    """The store in the data folder, made where it is missing. With COMPARATOR_HUB_STORAGE set, also kept on the Hub.

    Open one per process and keep it. Raises `UserError` if the folder cannot be used.
    """
    settings = settings or get_settings()
    folder = Folder(settings.data_dir)
    folder.create()
    remote = None
    if settings.hub_storage:
        from comparator.store.hub_mirror import open_remote

        remote = open_remote(settings, folder)
    store = Store(
        folder,
        public=settings.public,
        index_dir=settings.index_dir or settings.data_dir,
        upload_bytes=settings.max_upload_bytes,
        remote=remote,
    )
    if remote is not None:
        remote.start(store.adopt)
    return store


class Store:
    """Saved comparisons. Methods may be called from any thread, and from several processes on one folder."""

    def __init__(
        self,
        folder: Folder,
        *,
        public: bool,
        index_dir: Path,
        upload_bytes: int,
        remote: Remote | None = None,
    ):
        self.folder = folder
        self.public = public
        self.remote = remote
        self.cleaner: Cleaner | None = None
        self.upload_bytes = upload_bytes
        self._recent: OrderedDict[str, tuple[str, int, Comparison]] = (
            OrderedDict()
        )  # id → stamp, bytes, parsed
        self._recent_lock = threading.Lock()
        self._large = Budget(LARGE_PER_MINUTE, 60.0)
        self._index = Index(folder, index_dir, lambda id: summarize(self._parse(id)))

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the index and of the Hub. What is still to be uploaded waits on the disk."""
        if self.cleaner is not None:
            self.cleaner.close()
        self._index.close()
        if self.remote is not None:
            self.remote.close()

    # ---- documents

    def save(self, comparison: Comparison, owner: str | None = None, *, name: str = "") -> str:
        """Save a finished comparison under a new id, which it returns. When it returns, nothing can lose it.

        Raises `UserError` if the disk is full, or if the comparison is not one that could be opened again.
        """
        return self._save(comparison, owner, name, imported=False)

    def import_file(self, path: Path, owner: str | None = None, *, name: str = "") -> str:
        """Save a document that came from outside, under a new id, marked as imported. Raises `UserError`.

        It is untrusted: size (never more than may be opened is read into memory), depth, every type and every number
        are checked; its strings are data.
        """
        return self._save(document.read(path, max_bytes=self.upload_bytes), owner, name, imported=True)

    def load(self, id: str) -> Comparison:
        """A saved comparison, for anyone who has its id. Touches neither the index nor a model.

        Several callers may get the same object: it is not to be changed.

        Raises `BadId` (malformed), `NotFound`, `Deleted`, and `UserError` if the document is damaged or the Hub, where
        it may be, cannot be reached.
        """
        check_id(id)
        sidecar = self.folder.read_sidecar(id)
        if not self.folder.document_path(id).exists():
            sidecar = self._fetch(id)
        if sidecar is not None and sidecar.deleted_at is not None:
            raise Deleted(f"This comparison was deleted on {sidecar.deleted_at[:10]}.", _AGAIN)
        return attached(self._parse(id, asked=True), sidecar.votes if sidecar else None)

    def entry(self, id: str) -> Entry:
        """What the history says about one comparison, deleted ones included. Raises `BadId` or `NotFound`."""
        sidecar = self._sidecar(id)
        summary = sidecar.summary or summarize(self._parse(id))
        return Entry(
            id, sidecar.saved_at, summary.created_at, summary.model, summary.variants, summary.prompt[:300],
            summary.prompt_key, sidecar.name, summary.device, sidecar.imported, sidecar.deleted_at, sidecar.owner,
        )  # fmt: skip

    # ---- the history

    def search(
        self,
        query: str = "",
        owner: str | None = None,
        limit: int = 50,
        offset: int = 0,
        *,
        deleted: bool = False,
    ) -> list[Entry]:
        """The owner's comparisons, newest first; with `deleted`, the deleted ones, which can be brought back.

        Every word of `query` has to occur in the name, model, variants, device, date, id or (first 4,000 characters
        of the) prompt, in upper or lower case. In public mode without an owner: nothing.
        """
        if self.public and owner is None:
            return []
        return self._index.search(query, self._listed(owner), limit, offset, deleted=deleted)

    def count(self, query: str = "", owner: str | None = None, *, deleted: bool = False) -> int:
        """How many `search` would find without a limit."""
        if self.public and owner is None:
            return 0
        return self._index.count(query, self._listed(owner), deleted=deleted)

    def same_prompt(self, id: str, owner: str | None = None, limit: int = 50) -> list[Entry]:
        """The owner's other comparisons of the same prompt and system prompt, to be laid side by side."""
        if self.public and owner is None:
            return []
        key = self.entry(id).prompt_key
        return [e for e in self._index.same_prompt(key, self._listed(owner), limit) if e.id != id]

    def rename(self, id: str, name: str, owner: str | None = None) -> None:
        """Give it a name, or take it away with "". Raises `NotYours`, `BadId`, `NotFound`, `UserError`."""
        name = " ".join(name.split())
        if len(name) > MAX_NAME:
            raise UserError(f"The name has {len(name)} characters.", f"The limit is {MAX_NAME}.")
        self.update(id, owned(self.public, owner, name=name))

    def delete(self, id: str, owner: str | None = None) -> None:
        """Links to it stop working and it leaves the history, until `undelete`. Raises like `rename`."""
        self.update(id, owned(self.public, owner, deleted_at=_now()))
        if self.cleaner is not None:
            self.cleaner.wake()

    def undelete(self, id: str, owner: str | None = None) -> None:
        """Undo `delete`. Raises like `rename`."""
        self.update(id, owned(self.public, owner, deleted_at=None))

    # ---- permanently

    def purge(
        self, id: str, is_due: Callable[[Sidecar], bool] = lambda sidecar: bool(sidecar.deleted_at)
    ) -> bool:
        """Remove a comparison permanently: document, sidecar, row and, in the background, the copy on the Hub.

        Where `is_due` says no to its sidecar, nothing happens and False is returned. Interrupted at any point, it is
        whole and deleted or not there, and a second call finishes. Raises `BadId`, and `UserError` if the disk refuses.
        """
        with self._index.exclusive():
            if self.folder.document_path(id).exists() and not self.folder.is_removed(id):
                sidecar = self.folder.read_sidecar(id) or Sidecar(None, "")
                if not is_due(sidecar):
                    return False
                if sidecar.deleted_at is None:  # out of every list before the first file goes
                    sidecar = replace(sidecar, deleted_at=_now())
                    self.folder.write_sidecar(id, sidecar)
                    if sidecar.summary is not None:
                        self._put(id, sidecar)
        with self._index.exclusive():
            now = self.folder.read_sidecar(id)
            if now is not None and now.deleted_at is None and not self.folder.is_removed(id):
                return False  # its owner was faster
            self.folder.begin_purge(id)
            self.folder.remove(id)
            self._index.remove(id)
        with self._recent_lock:
            self._recent.pop(id, None)
        if self.remote is None:
            self.folder.end_purge(id)
        else:
            self.remote.forget(id)
        return True

    def ages(self) -> list[tuple[str, str, str | None, str]]:
        """Of every comparison, whoever owns it: id, `saved_at`, `deleted_at` and name."""
        return self._index.ages()

    def scrub(self) -> None:
        """After purges: leave no text of theirs in the index."""
        self._index.scrub()

    def start_cleaning(self, purge_days: int, retention_days: int) -> None:
        """Begin to purge in the background what is due; `store/purge.py` says what that is."""
        from comparator.store.purge import Cleaner

        self.cleaner = Cleaner(self, purge_days, retention_days)
        self.cleaner.start()

    def reindex(self) -> int:
        """Rebuild the index from the files; returns the number of comparisons. No data is lost."""
        return self._index.rebuild()

    @property
    def status(self) -> str:
        """One or two sentences for the page where links may not last, else ""."""
        from comparator.store.hub_mirror import durability

        return durability(self.folder.root, self.remote)

    # ---- inside

    def _save(self, comparison: Comparison, owner: str | None, name: str, *, imported: bool) -> str:
        comparison, votes = separated(replace(comparison, id=new_id()))
        data = document.dumps(comparison).encode()
        if not imported:
            comparison = document.loads(
                data, max_bytes=OWN_DOCUMENT_BYTES
            )  # better told now than by the link
        name = " ".join(name.split())[:MAX_NAME]
        sidecar = Sidecar(digest(owner), _now(), name, None, imported, summarize(comparison), votes)
        if self.remote is not None:
            self.remote.mark(comparison.id)  # first: a document without its mark would never be uploaded
        self.folder.write(comparison.id, data, sidecar)
        self._remember(comparison, len(data))
        self._put(comparison.id, sidecar)
        return comparison.id

    def _put(self, id: str, sidecar: Sidecar) -> None:
        try:
            self._index.put(id, sidecar)
        except UserError as problem:  # it is saved; the index finds it later
            log.warning("%s", problem)
        if self.remote is not None:
            self.remote.wake()

    def update(self, id: str, change: Callable[[Sidecar], Sidecar]) -> None:
        """Replace the sidecar by what `change` makes of it, with no other change in between; raises what `change` raises."""
        self._sidecar(id)  # if it has to come from the Hub, then before anybody is kept waiting
        with self._index.exclusive():
            sidecar = self._sidecar(id)
            if self.folder.is_removed(id):
                raise _not_found()
            if sidecar.summary is None:
                sidecar = replace(sidecar, summary=summarize(self._parse(id)))
            sidecar = change(sidecar)
            if self.remote is not None:
                self.remote.mark(id)
            self.folder.write_sidecar(id, sidecar)
            self._put(id, sidecar)

    def _sidecar(self, id: str) -> Sidecar:
        """The sidecar, or what stands for a missing one. Raises `BadId`, `NotFound`."""
        sidecar = self.folder.read_sidecar(id)
        if not self.folder.document_path(id).exists():
            sidecar = self._fetch(id)
        return sidecar or Sidecar(None, summarize(self._parse(id)).created_at)

    def _parse(self, id: str, asked: bool = False) -> Comparison:
        """`asked`: by a visitor, so that large ones have a budget on a public server."""
        stamp = self.folder.document_stamp(id)
        with self._recent_lock:
            if id in self._recent and self._recent[id][0] == stamp:
                self._recent.move_to_end(id)
                return self._recent[id][2]
        data = self.folder.read_document(id, OWN_DOCUMENT_BYTES)
        if data is None:
            raise _not_found()
        if asked and self.public and len(data) > LARGE_BYTES and not self._large.take(len(data)):
            raise UserError(
                "Large comparisons were opened too often on this server in the last minute.",
                "Try again in a minute.",
            )
        try:
            comparison = document.loads(data, max_bytes=OWN_DOCUMENT_BYTES)
        except UserError as problem:
            raise UserError(
                f"The document of this comparison is damaged. {problem.problem}", _AGAIN
            ) from problem
        if comparison.id != id:  # a file system that ignores case, or a file that was copied by hand
            raise _not_found()
        self._remember(comparison, len(data))
        return comparison

    def _remember(self, comparison: Comparison, size: int) -> None:
        """Keep the last few parsed documents: a link that is passed around is opened many times in a row."""
        with self._recent_lock:
            self._recent[comparison.id] = (self.folder.document_stamp(comparison.id), size, comparison)
            self._recent.move_to_end(comparison.id)
            while len(self._recent) > 1 and (
                len(self._recent) > RECENT or sum(size for _, size, _ in self._recent.values()) > RECENT_BYTES
            ):
                self._recent.popitem(last=False)

    def _fetch(self, id: str) -> Sidecar | None:
        """Bring a comparison from the Hub into the folder. Raises `NotFound`, or `UserError` if it cannot be reached."""
        here_only = self.remote is None or self.folder.is_removed(id)
        found = None if here_only else self.remote.fetch(id, self.upload_bytes)
        if found is None:
            raise _not_found()
        return self.adopt(id, *found)

    def adopt(self, id: str, data: bytes, side: bytes | None) -> Sidecar:
        """Keep a document under the id it has, as copied from another machine's store. Raises `UserError`.

        Both the document and its sidecar (None: it has none) are checked as if a stranger had sent them.
        """
        comparison = document.loads(data, max_bytes=self.upload_bytes)
        if comparison.id != id:
            raise _not_found()
        sidecar = parse_sidecar(side) if side is not None else Sidecar(None, comparison.created_at)
        sidecar = replace(sidecar, summary=summarize(comparison))
        self.folder.write(id, data, sidecar)
        if self.folder.is_removed(id):  # looked at after writing: whoever removes it marks it before removing
            self.folder.remove(id)
            raise _not_found()
        self._put(id, sidecar)
        return sidecar

    def _listed(self, owner: str | None) -> str | None:
        return digest(owner) if self.public else None


def _not_found() -> NotFound:
    return NotFound(
        "There is no comparison with this id here.", f"It may have been made on another machine. {_AGAIN}"
    )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


__all__ = ["BadId", "Deleted", "Entry", "NotFound", "NotYours", "Store", "Summary", "open_store"]
