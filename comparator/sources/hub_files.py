"""Files of a Hub repo → the Hugging Face cache: progress by bytes, Stop, deadlines, and what lies there already.

Every request runs in a thread of its own, so that a name server or a connection that does
not answer cannot hang the page. HF_HOME, HF_HUB_CACHE and HF_ENDPOINT are honoured.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparator.core.errors import Stopped, UserError
from comparator.sources import downloads, hub_problems
from comparator.sources.checkpoint import Progress
from comparator.sources.hub_login import login
from comparator.util import atomic_dir, disk, streams
from comparator.util.compat.huggingface_hub import abort_xet_downloads, download_in_small_pieces

ASK_S = 4.0  # what one question to the Hub may take
COMMIT = re.compile(r"[0-9a-f]{40}")
_WORKERS = 4


@dataclass(frozen=True)
class Listing:
    """A repo at one commit: file name → bytes. `parameters` is what the Hub says of its safetensors."""

    repo: str
    commit: str
    files: dict[str, int]
    parameters: int | None = None


def fetch(listing: Listing, names: Iterable[str], progress: Progress, what: str) -> Path:
    """Download files of a repo into the Hugging Face cache; returns the folder of that commit.

    `what` opens the progress messages. Files that are there already cost nothing. Serves adapters as well.
    Raises `UserError`, or `Stopped` when progress does: what was half downloaded is then deleted.
    """
    from huggingface_hub import snapshot_download

    download_in_small_pieces()
    names = list(names)
    missing = [n for n in names if _cached(listing, n) is None]
    if missing:
        total = sum(listing.files.get(n, 0) for n in missing)
        downloads.make_room(listing.repo, listing.commit, total, _place(), len(missing) == len(names))
        _check_space(_place(), total)
        meter = _Meter()

        def work() -> None:
            snapshot_download(
                listing.repo, revision=listing.commit, endpoint=endpoint(), cache_dir=cache_dir(), max_workers=_WORKERS,
                allow_patterns=[glob.escape(n) for n in missing], etag_timeout=ASK_S, tqdm_class=meter.bar_class(),
                token=login(),
            )  # fmt: skip

        def tell(_fraction: float | None, _message: str) -> None:
            done = min(total, meter.done)
            progress(done / total if total else None, f"{what}{done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

        try:
            in_background(work, tell, None)
        except Exception as error:
            if isinstance(error, Stopped):
                meter.stop = True
                abort_xet_downloads()
                raise
            if full := atomic_dir.disk_problem(error, _place() / listing.repo, listing.repo):
                advice = "Free some space there, or set HF_HOME to a writable folder on another disk."
                raise UserError(full.problem, advice) from error
            raise hub_problems.explain(error, listing.repo, None) from error
        finally:
            meter.stop = True  # whoever still downloads ends at the next piece
    downloads.used(listing.repo, listing.commit)
    paths = [p for n in names if (p := _cached(listing, n))]
    if not paths or len(paths) < len(names):
        raise UserError(f"{listing.repo} was not downloaded completely.", "Try again.")
    return paths[0].parents[names[0].count("/")]


def in_background(work: Callable[[], Any], progress: Progress, deadline_s: float | None) -> Any:
    """Run `work` in a thread and call `progress` meanwhile, so that Stop and the deadline hold whatever it waits for.

    Raises what `work` or `progress` raised, `TimeoutError` after the deadline. An abandoned thread ends by itself.
    """
    started_s = time.monotonic()

    def meanwhile() -> None:
        progress(None, "waiting for the Hub")
        if deadline_s is not None and time.monotonic() - started_s > deadline_s:
            raise TimeoutError("the Hub did not answer in time")

    return streams.wait(work, meanwhile, 0.2, "hub")


class _Meter:
    """Bytes that arrived, over all files; setting `stop` ends the downloads at their next piece."""

    def __init__(self) -> None:
        self.done, self.stop = 0, False
        self._lock = threading.Lock()

    def bar_class(self) -> type:
        meter = self

        class Bar:
            """What huggingface_hub needs of a tqdm class; counts, and draws nothing.

            It makes three: bytes on the wire, bytes written, and files. The further of the first two is what counts.
            """

            format_dict: dict = {}

            def __init__(self, *args: Any, **kwargs: Any):
                self.total, self.n, self.bytes = kwargs.get("total"), 0, kwargs.get("unit") == "B"
                self.update(0)

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: Any) -> None:
                pass

            def update(self, n: float | None = 1) -> None:
                if meter.stop:
                    raise Stopped
                with meter._lock:
                    self.n += int(n or 0)
                    meter.done = max(meter.done, self.n if self.bytes else 0)

            def __getattr__(self, name: str) -> Callable[..., None]:
                if name.startswith("__") or name in ("get_lock", "set_lock"):
                    raise AttributeError(name)
                return lambda *args, **kwargs: None

        return Bar


def _cached(listing: Listing, name: str) -> Path | None:
    """Where the file lies, if it is there whole. One that was cut off or changed since is deleted.

    huggingface_hub would take a file of the wrong size as it is.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(listing.repo, name, cache_dir=cache_dir(), revision=listing.commit)
    if not isinstance(found, str):
        return None
    path, size = Path(found), listing.files.get(name)
    if not size or path.stat().st_size == size:
        return path
    for part in (path.resolve(), path):
        part.unlink(missing_ok=True)
    return None


def remember_branch(path: Path, revision: str | None, commit: str) -> None:
    """Which commit a branch pointed to: refs/NAME, as huggingface_hub keeps it, for when the Hub cannot be asked."""
    if revision and COMMIT.fullmatch(revision):
        return
    file = path.parents[1] / "refs" / (revision or "main")
    try:
        if file.is_file() and file.read_text() == commit:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        disk.write(file, commit.encode(), mode=0o666)
    except OSError:
        pass  # a cache that cannot be written serves all the same


def _check_space(place: Path, total: int) -> None:
    there = place
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    if total and free < total + 64 * 10**6:
        raise UserError(
            f"The download takes {total / 1e6:,.0f} MB, and {place} has {free / 1e6:,.0f} MB free.",
            "Free some space there, or set HF_HOME to a folder on another disk.",
        )


def _place() -> Path:
    from huggingface_hub import constants

    return Path(cache_dir() or constants.HF_HUB_CACHE)


def endpoint() -> str | None:
    """Read here and not by huggingface_hub, which reads it once, when it is first imported."""
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None


def cache_dir() -> str | None:
    if explicit := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return os.path.expanduser(explicit)
    if home := os.environ.get("HF_HOME"):
        return str(Path(home).expanduser() / "hub")
    return None
