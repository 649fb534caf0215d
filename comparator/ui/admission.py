"""Limits on requests, and the store where comparisons are saved.

One `Admission` serves the whole page and its API: both call `admit` before anything runs, and `run` saves every
comparison before its last event is sent.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comparator.backends import source_kind
from comparator.core.errors import UserError
from comparator.core.events import Done, Event, Queued
from comparator.core.request import Request
from comparator.core.result import Comparison
from comparator.core.settings import Settings
from comparator.deploy import zerogpu_runner
from comparator.deploy.limits import limits_of, visitor
from comparator.deploy.rate_limit import RateLimiter
from comparator.engine.queue import asked_by
from comparator.engines import get_engine, get_trainings
from comparator.sources.hub_login import logged_in
from comparator.store import Store, open_store
from comparator.store.files import stored_bytes
from comparator.store.links import check_id, comparison_url
from comparator.ui.form import Shown
from comparator.ui.gradio_compat import visitors_login
from comparator.util import formatting

if TYPE_CHECKING:
    from comparator.training.registry import Trainings
    from comparator.training.visitors import VisitorTrainings

VOTES_PER_MINUTE = 40  # of one visitor of a public server
_OWNER = re.compile(r"[A-Za-z0-9_-]{22,64}")

log = logging.getLogger(__name__)


class Admission:
    """The limits, and the store (opened on first use). Thread-safe."""

    def __init__(self, settings: Settings):
        self.settings = settings
        self.limits = limits_of(settings)
        self.gate = RateLimiter(self.limits)
        self._votes = RateLimiter(
            replace(
                self.limits,
                requests_per_minute_total=None,
                requests_per_minute=VOTES_PER_MINUTE if settings.public else None,
            )
        )
        self._store: Store | None = None
        self._stored_bytes, self._measured_s = 0, float("-inf")
        self._lock = threading.Lock()

    @property
    def store(self) -> Store:
        """Raises `UserError` if the data folder cannot be used."""
        with self._lock:
            if self._store is None:
                self._store = open_store(self.settings)
                self._store.start_cleaning(self.settings.purge_days, self.settings.retention_days)
            return self._store

    def open_in_background(self) -> None:
        """Open the store without waiting for it, so that what is due is removed also where nobody visits."""
        threading.Thread(target=self._open, name="open-store", daemon=True).start()

    def _open(self) -> None:
        try:
            self.store  # noqa: B018
        except UserError as problem:
            log.warning("Saved comparisons cannot be used: %s", problem)

    # ---- before a run

    def admit(self, request: Request, asker: Any, owner: Any = None) -> None:
        """Count a comparison, or raise `UserError` naming the limit it exceeds. `asker` is a gr.Request or None;
        `owner` is the visitor's key as the browser sent it."""
        self.limits.check(request)
        for adapter in {cell.adapter.source for cell in request.cells if cell.adapter is not None}:
            self.check_owner(adapter, owner)
        queue, waiting, most = get_engine().queue, get_engine().state().waiting, self.settings.queue_size
        own, own_most = queue.of(self.visitor(asker)), max(2, most // 5)
        if self.settings.public and own >= own_most:
            raise UserError(
                f"{own} of your comparisons are running or queued; the limit is {own_most} per visitor.",
                "Wait until one has ended, or stop one.",
            )
        if waiting >= most:
            raise UserError(
                f"{waiting} comparisons are already queued; the limit is {most} (COMPARATOR_QUEUE_SIZE).",
                "Try again in a minute, or run Quant Comparator on your own machine.",
            )
        self.count(asker)

    def trainings(self, owner: Any) -> Trainings | VisitorTrainings:
        """Training jobs and adapters as the visitor with this key may see them. `owner`: as the browser sent it."""
        return get_trainings().seen_by(owner_of(owner))

    def check_owner(self, adapter: str, owner: Any) -> None:
        """Raises `UserError` for an adapter that another visitor trained, in the words for one that does not exist."""
        if not self.trainings(owner).owns_adapter(adapter.strip()):
            raise UserError(
                f"There is no adapter “{adapter[:200]}”.",
                "Adapters trained here can be used only in the browser that trained them.",
            )

    def count(self, asker: Any) -> None:
        """Count one request of this visitor; raises `UserError` above the rate limit."""
        self.gate.admit(self.visitor(asker))

    def count_vote(self, asker: Any) -> None:
        """Count one vote of this visitor; on a public server raises `UserError` above VOTES_PER_MINUTE."""
        try:
            self._votes.admit(self.visitor(asker))
        except UserError as problem:
            most = formatting.plural(VOTES_PER_MINUTE, "vote")
            raise UserError(
                f"You have cast {most} in the last minute, which is the limit.", problem.advice
            ) from None

    def visitor(self, asker: Any) -> str:
        """Who asks: see `limits.visitor`."""
        headers = {k.lower(): v for k, v in dict(getattr(asker, "headers", None) or {}).items()}
        client = getattr(asker, "client", None)
        return visitor(headers, getattr(client, "host", None), self.settings)

    def judge_size(self, request: Request) -> None:
        """Raises `UserError` if a model is too large for this server. May query the Hub, so never call it on the event loop."""
        if self.limits.max_model_parameters is None:
            return
        self.limits.check_size(get_engine().facts(request.model))
        variants = [c.variant for c in request.cells if source_kind(c.variant) == "checkpoint"]
        for source in dict.fromkeys(v.source for v in variants if v.source):
            try:
                facts = get_engine().facts(source)
            except UserError:
                continue  # its own column reports the error
            self.limits.check_size(facts)

    # ---- afterwards

    def run(
        self,
        request: Request,
        owner: str | None,
        cancel: threading.Event,
        emit: Callable[[Event], None],
        asker: Any = None,
    ) -> None:
        """Run a comparison; `emit` gets its events, the last with the id under which the comparison was saved.

        It waits in the queue of its visitor, for COMPARATOR_MAX_WAIT_S at most (then `UserError`), and is stopped after
        COMPARATOR_MAX_COMPARISON_S on the device.

        A comparison without any result is not saved. One that cannot be saved (disk full) is still shown; `holds` tells
        whether it was saved.
        """
        clock = _Clock(self.limits.max_comparison_s, cancel)
        in_queue = _Clock(self.limits.max_wait_s, cancel)

        def save_and_emit(event: Event) -> None:
            if in_queue.is_over:
                return
            if not isinstance(event, Queued):
                in_queue.stop()
                clock.start()
            emit(Done(self.save(event.comparison, owner)) if isinstance(event, Done) else event)

        try:
            with asked_by(self.visitor(asker)), logged_in(visitors_login(asker)):
                self.judge_size(request)
                in_queue.start()
                zerogpu_runner.run(request, get_engine(), cancel, save_and_emit)
        finally:
            clock.stop()
            in_queue.stop()
        if in_queue.is_over:
            raise UserError(
                f"This comparison was queued for {self.limits.max_wait_s:,} s, the limit here (COMPARATOR_MAX_WAIT_S).",
                "Try again when fewer are queued, or run Quant Comparator on your own machine.",
            )

    def save(self, comparison: Comparison, owner: str | None) -> Comparison:
        """The comparison with the id it was saved under; unchanged if it could not be saved."""
        if not any(cell.text or cell.status != "stopped" for cell in comparison.cells):
            return comparison
        try:
            self.require_room()
            return replace(comparison, id=self.store.save(comparison, owner))
        except UserError as problem:
            log.warning("A comparison was not saved: %s", problem)
            return comparison

    def require_room(self) -> None:
        """Raises `UserError` where saved comparisons take as much of the disk as they may. Looks at most once a minute."""
        most, now_s = self.limits.max_stored, time.monotonic()
        if most is None:
            return
        if now_s - self._measured_s > 60:
            self._stored_bytes, self._measured_s = stored_bytes(self.store.folder.documents), now_s
        if self._stored_bytes > most:
            raise UserError(
                f"Saved comparisons take {self._stored_bytes / 1e9:.1f} GB here; the limit is {most / 1e9:.1f} GB "
                "(COMPARATOR_MAX_STORED).",
                "Delete some, or run Quant Comparator on your own machine.",
            )

    def shown(self, comparison: Comparison, recorded: bool = False) -> Shown:
        """What a page holds of a comparison: its id where it is saved here, else all of it."""
        id = comparison.id
        load = (lambda: self.store.load(id)) if self.holds(id) else None
        return Shown(comparison, recorded, load=load)

    def holds(self, id: str) -> bool:
        """Whether this server has a saved comparison with this id."""
        try:
            return self.store.folder.document_path(check_id(id)).exists()
        except UserError:
            return False


class _Clock:
    """Sets `cancel` so many seconds after its first `start`; None: never."""

    def __init__(self, seconds: float | None, cancel: threading.Event):
        self.is_over = False
        self._timer = None if seconds is None else threading.Timer(seconds, self._end, (cancel,))

    def _end(self, cancel: threading.Event) -> None:
        self.is_over = True
        cancel.set()

    def start(self) -> None:
        if self._timer is not None and self._timer.ident is None:
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def owner_of(key: Any) -> str | None:
    """The visitor's key as the browser sent it, or None if it is not a valid key."""
    return key if isinstance(key, str) and _OWNER.fullmatch(key) else None


def base_url(asker: Any) -> str:
    """The address of the page as its visitor has it; "/" where that is not known. `asker` is a gr.Request or None."""
    from comparator.ui.gradio_compat import root_url

    request = getattr(asker, "request", None)
    return "/" if request is None else root_url(request)


def link(asker: Any, id: str) -> str:
    return comparison_url(base_url(asker), id)
