"""What a public server downloaded for its visitors: at most so many bytes; the least recently used go first.

One small file for each commit of a repo, in the cache folder; its time is that of the last use. What was in the Hugging
Face cache before is the operator's: it is neither counted nor removed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.util import disk, records

_lock = threading.Lock()
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Download:
    repo: str
    commit: str
    bytes: int


def make_room(repo: str, commit: str, more: int, place: Path, is_new: bool) -> None:
    """Before `more` bytes of a commit are downloaded into the cache `place`: removes others, and counts these.

    is_new: nothing of this commit is there yet. Raises `UserError` for what is larger than all that may be kept.
    """
    most = get_settings().max_downloads_bytes
    if most is None:
        return
    if more > most:
        raise UserError(
            f"{repo} has {more / 1e9:,.1f} GB, and this server stores {most / 1e9:,.1f} GB of downloaded models at most "
            "(COMPARATOR_MAX_DOWNLOADS).",
            "Choose a smaller model, or run Quant Comparator on your own machine.",
        )
    with _lock:
        own = _file(repo, commit)
        if not own.exists() and not is_new:
            return  # the operator has part of it
        known = dict(_entries())
        kept = known.pop(own).bytes if own in known else 0
        total = kept + more + sum(entry.bytes for entry in known.values())
        for file, entry in known.items():
            if total <= most:
                break
            _remove(entry, place)
            file.unlink(missing_ok=True)
            total -= entry.bytes
        own.parent.mkdir(parents=True, exist_ok=True)
        disk.write(own, json.dumps(asdict(Download(repo, commit, kept + more))).encode())


def used(repo: str, commit: str) -> None:
    """This commit is the last to be removed now."""
    if get_settings().max_downloads_bytes is not None and (file := _file(repo, commit)).exists():
        os.utime(file, (time.time(), time.time()))


def _file(repo: str, commit: str) -> Path:
    digest = hashlib.sha256(f"{repo}@{commit}".encode()).hexdigest()[:32]
    return get_settings().cache_dir / "downloads" / f"{digest}.json"


def _entries() -> Iterator[tuple[Path, Download]]:
    """The least recently used first."""
    for file in sorted(_file("", "").parent.glob("*.json"), key=lambda f: f.stat().st_mtime):
        try:
            yield file, records.record(Download, json.loads(file.read_text()))
        except ValueError:
            file.unlink(missing_ok=True)


def _remove(entry: Download, place: Path) -> None:
    from huggingface_hub import scan_cache_dir

    log.info("Removing %s@%s, least recently used by visitors", entry.repo, entry.commit[:7])
    try:
        scan_cache_dir(place).delete_revisions(entry.commit).execute()
    except (OSError, ValueError) as error:
        log.warning("%s cannot be removed: %s", entry.repo, error)
