"""Files of a Hub repo → the Hugging Face cache: progress by bytes, Stop, deadlines, and what lies there already.

Knows nothing of models. Every request runs in a thread of its own, so that a name server or a connection that does
not answer cannot hang the page. HF_HOME, HF_HUB_CACHE and HF_ENDPOINT are honoured.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comparator import cache
from comparator.sources import hub_problems
from comparator.sources.checkpoint import Progress
from comparator.types import Problem, Stopped

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
    Raises `Problem`, or `Stopped` when progress does: what was half downloaded is then deleted.
    """
    from huggingface_hub import hf_hub_download

    names = list(names)
    missing = [n for n in names if _cached(listing, n) is None]
    if missing:
        total = sum(listing.files.get(n, 0) for n in missing)
        _check_space(_place(), total)
        meter = _Meter(total)

        def one(name: str) -> None:
            meter.add(0)
            hf_hub_download(
                listing.repo, name, revision=listing.commit, endpoint=endpoint(), cache_dir=cache_dir(),
                etag_timeout=ASK_S, tqdm_class=meter.bar_class(), force_download=_wrong_size(listing, name),
            )  # fmt: skip

        def tell(_fraction: float | None, _message: str) -> None:
            fraction = min(1.0, meter.done / total) if total else None
            progress(fraction, f"{what}{meter.done / 1e6:,.1f} of {total / 1e6:,.1f} MB")

        try:
            in_background(lambda: _in_threads(one, missing), tell, None)
        except Exception as error:
            if isinstance(error, Stopped):
                meter.stop = True
                _end_xet()
                raise
            if full := cache.disk_problem(error, _place() / listing.repo, listing.repo):
                advice = (
                    "Free some space there, or set HF_HOME to a folder on another disk that you may write to."
                )
                raise Problem(full.problem, advice) from error
            raise hub_problems.explain(error, listing.repo, None) from error
        finally:
            meter.stop = True  # whoever still downloads ends at the next piece
    paths = [p for n in names if (p := _cached(listing, n))]
    if not paths or len(paths) < len(names):
        raise Problem(f"{listing.repo} was not downloaded completely.", "Try again.")
    return Path(paths[0]).parents[names[0].count("/")]


def in_background(work: Callable[[], Any], progress: Progress, deadline_s: float | None) -> Any:
    """Run `work` in a thread and call `progress` meanwhile, so that Stop and the deadline hold whatever it waits for.

    Raises what `work` or `progress` raised, `TimeoutError` after the deadline. An abandoned thread ends by itself.
    """
    result: list[Any] = []
    failure: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            failure.append(error)
        finally:
            done.set()

    threading.Thread(target=run, daemon=True, name="hub").start()
    started_s = time.monotonic()
    while not done.wait(0.2):
        progress(None, "waiting for the Hub")
        if deadline_s is not None and time.monotonic() - started_s > deadline_s:
            raise TimeoutError("the Hub did not answer in time")
    if failure:
        raise failure[0]
    return result[0]


def _in_threads(work: Callable[[str], None], names: list[str]) -> None:
    """`work` on every name, some at a time; the first failure ends it. Daemon threads: they never hold up an exit."""
    todo: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in names:
        todo.put(name)
    failures: list[BaseException] = []

    def run() -> None:
        while not failures:
            try:
                work(todo.get_nowait())
            except queue.Empty:
                return
            except BaseException as error:
                failures.append(error)

    threads = [
        threading.Thread(target=run, daemon=True, name=f"hub-{i}") for i in range(min(_WORKERS, len(names)))
    ]
    for thread in threads:
        thread.start()
    while any(t.is_alive() for t in threads) and not failures:
        threads[0].join(0.05) if threads[0].is_alive() else time.sleep(0.05)
    if failures:
        raise failures[0]


def _end_xet() -> None:
    """What huggingface_hub itself does on Ctrl-C: Xet downloads outside Python, where no exception reaches it."""
    if "hf_xet" in sys.modules:
        with contextlib.suppress(Exception):
            from huggingface_hub.utils._xet import abort_xet_session

            abort_xet_session()


class _Meter:
    """Bytes that arrived, over all files; setting `stop` ends the downloads at their next piece."""

    def __init__(self, total: int):
        self.total, self.done, self.stop = total, 0, False
        self._lock = threading.Lock()

    def add(self, n: float | None) -> None:
        if self.stop:
            raise Stopped
        with self._lock:
            self.done += int(n or 0)

    def bar_class(self) -> type:
        meter = self

        class Bar:
            """What huggingface_hub needs of a tqdm class; counts, and draws nothing."""

            def __init__(self, *args: Any, **kwargs: Any):
                self.total, self.n = kwargs.get("total"), 0

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *_: Any) -> None:
                pass

            def update(self, n: float | None = 1) -> None:
                meter.add(n)

            def update_transfer(self, n: float | None = 1) -> None:
                """Bytes on the wire, which Xet counts apart; they would count twice."""

            def __getattr__(self, name: str) -> Callable[..., None]:
                if name.startswith("__"):
                    raise AttributeError(name)
                return lambda *args, **kwargs: None

        return Bar


def _cached(listing: Listing, name: str) -> str | None:
    """Where the file lies, if it is there whole."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(listing.repo, name, cache_dir=cache_dir(), revision=listing.commit)
    size = listing.files.get(name)
    return found if isinstance(found, str) and (not size or os.path.getsize(found) == size) else None


def _wrong_size(listing: Listing, name: str) -> bool:
    """A file that was cut off or changed since: huggingface_hub would take it as it is."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(listing.repo, name, cache_dir=cache_dir(), revision=listing.commit)
    size = listing.files.get(name)
    return isinstance(found, str) and bool(size) and os.path.getsize(found) != size


def remember_branch(path: Path, revision: str | None, commit: str) -> None:
    """Which commit a branch stood at: refs/NAME, as huggingface_hub keeps it, for when the Hub cannot be asked."""
    if revision and COMMIT.fullmatch(revision):
        return
    file = path.parents[1] / "refs" / (revision or "main")
    try:
        if file.is_file() and file.read_text() == commit:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        tmp = file.with_name(f".{file.name}.{os.getpid()}")
        tmp.write_text(commit)
        tmp.replace(file)
    except OSError:
        pass  # a cache that cannot be written serves all the same


def _check_space(place: Path, total: int) -> None:
    there = place
    while not there.exists() and there != there.parent:
        there = there.parent
    free = shutil.disk_usage(there).free
    if total and free < total + 64 * 10**6:
        raise Problem(
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
