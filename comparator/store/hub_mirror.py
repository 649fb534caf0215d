"""A copy of every saved comparison in a dataset repo on the Hub, for machines whose disk is lost at a restart.

Saving never waits for the Hub: what is to be uploaded is remembered in the data folder (one empty file each), a
thread uploads it, several comparisons a commit, and tries again for as long as it takes. `load` asks the Hub for what
is not here. When the app starts, what the Hub has and this disk has not is brought back, so that the history survives
too. The repo is created private, since documents hold people's prompts; the owner of the token decides otherwise.

    DATA_DIR/pending/ID            waits to be uploaded
    DATA_DIR/pending/ID.sending    is being uploaded; a later change makes a new ID beside it

Imports huggingface_hub only when used.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.store import hub_removal
from comparator.store.files import MAX_SIDECAR_BYTES, Folder
from comparator.store.links import BadId, check_id
from comparator.util import disk

BATCH = 100  # comparisons in one commit
PAUSE_S = 30.0  # between two commits: the Hub takes some 128 an hour
RETRY_S = 60.0  # after a failure, doubled up to the next one
LONGEST_RETRY_S = 900.0
FETCH_TIMEOUT_S = 10.0
MAX_RESTORED = 2_000  # comparisons brought back at a start
_MISSING_S = 30.0  # an id that the Hub did not have is not asked for again so soon
_SENDING = ".sending"
_REPO = re.compile(r"(?:[\w.-]+/)?[\w.-]+")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteStatus:
    """What the page can say about the copies on the Hub."""

    repo: str
    pending: int  # comparisons that only this machine holds
    error: str | None = None  # why the last attempt failed; None when it did not

    @property
    def text(self) -> str:
        """A sentence where links may not last, else ""."""
        if self.error is None:
            return ""
        what = {0: "Links made now", 1: "One comparison and its link"}.get(
            self.pending, f"{self.pending} comparisons and their links"
        )
        return (
            f"{what} exist only on this machine until {self.repo} on the Hub can be written to: {self.error} "
            "Everything else works; the upload is retried automatically."
        )


def open_remote(settings: Settings, folder: Folder) -> Remote:
    """The copy named by COMPARATOR_HUB_STORAGE. Raises `UserError` if that is not the name of a repo."""
    repo = (settings.hub_storage or "").strip().removeprefix("datasets/")
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise UserError(
            f"COMPARATOR_HUB_STORAGE is “{settings.hub_storage}”, which is not the name of a dataset repo.",
            "Write user/name, and set HF_TOKEN to a token that may write to it.",
        )
    return Remote(repo, folder)


def durability(data_dir: Path, remote: Remote | None) -> str:
    """A sentence for the page where links may not outlive this machine, else ""."""
    if remote is not None:
        return remote.status().text
    if os.environ.get("SPACE_ID") and not _on_a_volume(data_dir):
        return (
            "Links made here stop working when this machine restarts, because its disk is then emptied. Download what you "
            "want to keep; the Space's owner can set COMPARATOR_HUB_STORAGE, or attach a volume."
        )
    return ""


def _on_a_volume(path: Path) -> bool:
    """Whether something is mounted at the folder or above it, apart from the root."""
    return any(p.is_mount() for p in (path, *path.parents) if p != Path(p.anchor))


class Remote:
    """The copies in one dataset repo. Methods may be called from any thread; none but `fetch` waits for the Hub."""

    def __init__(
        self,
        repo: str,
        folder: Folder,
        *,
        pause_s: float = PAUSE_S,
        retry_s: float = RETRY_S,
        first_wait_s: float = 1.0,
    ):
        self.repo = repo
        self.folder = folder
        self._pending = folder.root / "pending"
        self._pause_s, self._retry_s, self._first_wait_s = pause_s, retry_s, first_wait_s
        self._adopt: Callable[[str, bytes, bytes | None], None] | None = None
        self._error: str | None = None
        self._missing: dict[str, float] = {}  # id → when the Hub said that it has none
        self._fetching = threading.BoundedSemaphore(4)
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, adopt: Callable[[str, bytes, bytes | None], None] | None = None) -> None:
        """Begin to upload what waits, and to bring back what only the Hub has.

        `adopt(id, document, sidecar)` keeps a document that was brought back; it judges the untrusted bytes itself.
        """
        self._adopt = adopt
        self._thread = threading.Thread(target=self._work, name="hub-storage", daemon=True)
        self._thread.start()

    def mark(self, id: str) -> None:
        """Remember on the disk that this comparison has to be uploaded. Never raises: saving must not fail by it."""
        try:
            disk.make_folder(self._pending)
            disk.touch(self._pending / check_id(id))
        except OSError as error:
            log.warning("%s will not be uploaded: %s", id, error)

    def forget(self, id: str) -> None:
        """A comparison was removed here permanently: nothing of it goes up any more, and its copy is to go."""
        for end in ("", _SENDING):
            (self._pending / (check_id(id) + end)).unlink(missing_ok=True)
        self.wake()

    def wake(self) -> None:
        """Something was marked and is on the disk now."""
        self._wake.set()

    def status(self) -> RemoteStatus:
        return RemoteStatus(self.repo, len(self._waiting()), self._error)

    def wait(self, timeout_s: float) -> bool:
        """Wait until everything is uploaded, and removed what was purged; False if it is not by then."""
        end_s = time.monotonic() + timeout_s
        while self._waiting() or self.folder.purging():
            if time.monotonic() > end_s:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    # ---- down

    def fetch(self, id: str, max_bytes: int) -> tuple[bytes, bytes | None] | None:
        """A document and its sidecar from the Hub, or None if it has none. Untrusted, at most `max_bytes`.

        Raises `UserError` if the Hub cannot be asked now, within some 10 s.
        """
        check_id(id)
        now_s = time.monotonic()
        if now_s - self._missing.get(id, -_MISSING_S) < _MISSING_S:
            return None
        if not self._fetching.acquire(timeout=FETCH_TIMEOUT_S):
            raise self._unreachable("there are too many requests at once.")
        try:
            document = self._download(path_of(id, ".json"), max_bytes)
            if document is None:
                if len(self._missing) > 1_000:
                    self._missing.clear()
                self._missing[id] = now_s
                return None
            return document, self._download(path_of(id, ".meta.json"), MAX_SIDECAR_BYTES)
        except UserError:
            raise
        except Exception as error:
            raise self._unreachable(_reason(error)) from error
        finally:
            self._fetching.release()

    def _download(self, path: str, max_bytes: int) -> bytes | None:
        import stamina
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = hf_hub_url(self.repo, path, repo_type="dataset")
        for attempt in stamina.retry_context(
            on=_is_passing, attempts=2, timeout=FETCH_TIMEOUT_S, wait_initial=0.2, wait_max=1.0
        ):
            with (
                attempt,
                get_session().stream(
                    "GET", url, headers=build_hf_headers(), follow_redirects=True, timeout=FETCH_TIMEOUT_S / 2
                ) as response,
            ):
                if response.status_code == 404:
                    return None
                if response.status_code >= 400:
                    response.read()
                    hf_raise_for_status(response)
                data = bytearray()
                for part in response.iter_bytes():
                    data += part
                    if len(data) > max_bytes:
                        raise UserError(
                            f"The copy of this comparison on the Hub has more than {max_bytes / 1e6:,.0f} MB.",
                            "It was not written by this program.",
                        )
                return bytes(data)
        raise AssertionError("unreachable")

    def _unreachable(self, reason: str) -> UserError:
        return UserError(
            f"This comparison is not on this machine, and its copy on the Hub cannot be fetched now: {reason}",
            "Try again in a minute.",
        )

    # ---- up

    def _work(self) -> None:
        """The thread: bring back once, then upload whatever waits, until `close`."""
        wait_s, restored = self._retry_s, False
        while not self._stop.is_set():
            self._wake.clear()
            try:
                if not restored:
                    self._restore()
                    restored = True
                sent = self._upload() + hub_removal.remove_copies(
                    self.repo, self.folder, self._retrying, path_of
                )
            except Exception as error:  # whatever it is, the app goes on and this is tried again
                self._error = _reason(error)
                log.warning("Copies on the Hub (%s) could not be written yet: %s", self.repo, self._error)
                self._stop.wait(wait_s)
                wait_s = min(wait_s * 2, LONGEST_RETRY_S)
                continue
            self._error, wait_s = None, self._retry_s
            if sent:
                self._stop.wait(self._pause_s)
            else:
                self._wake.wait(self._retry_s)

    def _upload(self) -> int:
        """One commit of what waits; returns how many comparisons went up. Raises what the Hub's client raises."""
        ids = self._waiting()[:BATCH]
        if not ids:
            return 0
        from huggingface_hub import CommitOperationAdd, HfApi

        self._prepare()
        for id in ids:  # claimed before anything is read, so that a change meanwhile is marked again
            try:
                (self._pending / id).replace(self._pending / (id + _SENDING))
            except FileNotFoundError:
                continue  # claimed earlier, by an attempt that failed
        operations = []
        for id in ids:
            for path, end in (
                (self.folder.document_path(id), ".json"),
                (self.folder.sidecar_path(id), ".meta.json"),
            ):
                if path.exists():
                    operations.append(CommitOperationAdd(path_of(id, end), path.read_bytes()))
        message = f"{len(ids)} comparison{'s' if len(ids) > 1 else ''}"
        self._retrying(
            lambda: HfApi().create_commit(self.repo, operations, commit_message=message, repo_type="dataset")
        )
        for id in ids:
            (self._pending / (id + _SENDING)).unlink(missing_ok=True)
            if self.folder.is_removed(id):  # by another process, meanwhile
                self.folder.begin_purge(id)
        return len(ids)

    def _restore(self) -> None:
        """Bring back what only the Hub has, and mark what only this disk has."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import EntryNotFoundError

        self._prepare()
        here = set(self.folder.scan())
        try:
            files = HfApi().list_repo_tree(self.repo, "comparisons", recursive=True, repo_type="dataset")
            there = {id for file in files if (id := _id_of(file.path))}
        except EntryNotFoundError:
            there = set()
        there = {id for id in there if not self.folder.is_removed(id)}
        for id in here - there:
            self.mark(id)
        if self._adopt is None:
            return
        for id in sorted(there - here)[:MAX_RESTORED]:
            if self._stop.is_set():
                return
            try:
                found = self.fetch(id, 32_000_000)
                if found is not None:
                    self._adopt(id, *found)
            except UserError as problem:
                log.warning("%s was not restored from the Hub: %s", id, problem)

    def _prepare(self) -> None:
        """The repo is there, private if it is new. Asked before each commit: it is a quick way to learn that the Hub
        cannot be reached, where a commit would try for half a minute."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError

        def work() -> None:
            api = HfApi()
            try:
                api.repo_info(self.repo, repo_type="dataset", timeout=FETCH_TIMEOUT_S)
            except RepositoryNotFoundError:
                api.create_repo(self.repo, repo_type="dataset", private=True, exist_ok=True)

        self._retrying(work)

    def _retrying(self, work: Callable[[], Any]) -> None:
        import stamina

        for attempt in stamina.retry_context(
            on=_is_passing, attempts=3, timeout=120.0, wait_initial=self._first_wait_s, wait_max=10.0
        ):
            with attempt:
                if self._stop.is_set():
                    raise UserError("The app is shutting down.", "")
                work()

    def _waiting(self) -> list[str]:
        """Ids to be uploaded, those of an interrupted upload included."""
        try:
            found = sorted(self._pending.iterdir(), key=lambda path: path.name)
        except OSError:
            return []
        ids = dict.fromkeys(path.name.removesuffix(_SENDING) for path in found)
        # A mark without its document: it is being saved just now, or the process that saved it was killed.
        return [id for id in ids if _is_id(id) and self.folder.document_path(id).exists()]


def path_of(id: str, end: str) -> str:
    return (
        f"comparisons/{id[:2]}/{id}{end}"  # in folders of a few files: the Hub wants less than 10,000 in one
    )


def _id_of(path: str) -> str | None:
    name = path.rpartition("/")[2]
    if not name.endswith(".json") or name.endswith(".meta.json"):
        return None
    id = name.removesuffix(".json")
    return id if _is_id(id) and path == path_of(id, ".json") else None


def _is_id(text: str) -> bool:
    try:
        check_id(text)
    except BadId:
        return False
    return True


def _status_code(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_passing(error: Exception) -> bool:
    """Whether it may be different in a moment: the network, or the Hub being busy; not a wrong token."""
    code = _status_code(error)
    if code is not None:
        return code == 429 or code >= 500
    return type(error).__module__.partition(".")[0] in (
        "httpx",
        "httpx2",
        "httpcore",
        "httpcore2",
    ) or isinstance(error, OSError)


def _reason(error: BaseException) -> str:
    """One sentence without an address, a token or a stack in it."""
    if isinstance(error, UserError):
        return error.problem
    code = _status_code(error)
    if code in (401, 403):
        return f"the Hub refused it ({code}); HF_TOKEN has to be a token that may write there."
    if code is not None:
        return f"the Hub answered with error {code}."
    if _is_passing(error) or "offline" in type(error).__name__.lower():
        return "the Hub cannot be reached."
    return f"{type(error).__name__}."
