"""Who asks, what they may ask for, and where what they get is kept. Knows nothing of how anything looks.

One `Desk` serves the whole page and its API: both go through `admit` before anything runs, and everything that
finishes is saved by `keep` before anybody is told that it is done.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from comparator.limits import Gate, limits_of, visitor
from comparator.settings import Settings
from comparator.share import check_id, comparison_url
from comparator.store import Store, open_store
from comparator.types import Comparison, Done, Event, Problem, Request

_OWNER = re.compile(r"[A-Za-z0-9_-]{22,64}")

log = logging.getLogger(__name__)


class Desk:
    """The store, opened when it is first needed, and the limits. Safe from any thread."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.limits = limits_of(settings)
        self.gate = Gate(self.limits)
        self._store: Store | None = None
        self._lock = threading.Lock()

    @property
    def store(self) -> Store:
        """Raises `Problem` if the data folder cannot be used."""
        with self._lock:
            if self._store is None:
                self._store = open_store(self.settings)
            return self._store

    # ---- before a run

    def admit(self, request: Request, asker: Any) -> None:
        """Let a comparison in and count it, or raise `Problem` naming the limit. `asker` is a gr.Request or None."""
        from comparator.engine import get_engine

        self.limits.check(request)
        waiting, most = get_engine().state().waiting, self.settings.queue_size
        if waiting >= most:
            raise Problem(
                f"{waiting} comparisons wait already; the limit here is {most} (COMPARATOR_QUEUE_SIZE).",
                "Try again in a minute, or run Quant Comparator on your own machine.",
            )
        self.count(asker)

    def count(self, asker: Any) -> None:
        """One more request of this visitor within the minute, or a `Problem`."""
        headers = {k.lower(): v for k, v in dict(getattr(asker, "headers", None) or {}).items()}
        client = getattr(asker, "client", None)
        self.gate.admit(visitor(headers, getattr(client, "host", None), self.settings))

    def judge_size(self, request: Request) -> None:
        """Raises `Problem` if a model is too large for this server. May ask the Hub, so not on the page's own thread."""
        if self.limits.max_model_parameters is None:
            return
        from comparator.engine import get_engine

        self.limits.check_size(get_engine().facts(request.model))
        for source in dict.fromkeys(c.variant.source for c in request.cells if c.variant.source):
            try:
                facts = get_engine().facts(source)
            except Problem:
                continue  # what it is, its own column will say
            self.limits.check_size(facts)

    # ---- afterwards

    def keep(self, request: Request, events: Iterator[Event], owner: str | None) -> Iterator[Event]:
        """The same events; the last carries the id under which the comparison is saved by then.

        One of which nothing was measured is passed on unsaved, and so is one that cannot be saved: what is on the
        page is worth more than a page that only says that the disk is full. `holds` tells which it was.
        """
        self.judge_size(request)
        try:
            for event in events:
                if isinstance(event, Done):
                    event = Done(self.save(event.comparison, owner))
                yield event
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()

    def save(self, comparison: Comparison, owner: str | None) -> Comparison:
        """The comparison with the id it is saved under; as it was where it could not be saved."""
        if not any(cell.text or cell.status != "stopped" for cell in comparison.cells):
            return comparison
        try:
            return replace(comparison, id=self.store.save(comparison, owner))
        except Problem as problem:
            log.warning("A comparison was not saved: %s", problem)
            return comparison

    def holds(self, id: str) -> bool:
        """Whether a link to this id opens something here."""
        try:
            return self.store.folder.document_path(check_id(id)).exists()
        except Problem:
            return False


def owner_of(key: Any) -> str | None:
    """The visitor's key as their browser sent it, or None where it is no such key."""
    return key if isinstance(key, str) and _OWNER.fullmatch(key) else None


def base_url(asker: Any) -> str:
    """The address of the page as its visitor has it: through proxies, under a path, embedded in another page."""
    from gradio.route_utils import API_PREFIX, get_root_url

    request = getattr(asker, "request", None)
    if request is None:
        return "/"
    path = request.url.path
    route = path[path.rfind(API_PREFIX) :] if API_PREFIX in path else "/"
    root = getattr(request.app, "root_path", "") or request.scope.get("root_path")
    return get_root_url(request, route, root) + "/"


def link(asker: Any, id: str) -> str:
    return comparison_url(base_url(asker), id)
