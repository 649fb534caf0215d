"""A request → events, here or on a lent GPU: the one place that knows a Space may have no GPU of its own.

On ZeroGPU one call runs all columns in a process that lives as long as the call. Everywhere else this is
`comparator.compare.compare` itself. Import it before torch. Knows nothing of the page.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from typing import Any

from comparator import zerogpu
from comparator.types import Event, Problem, Request, Variant

_PARENT = os.getpid()


def compare(request: Request, cancel: threading.Event) -> Iterator[Event]:
    """The comparison's events; the work starts with the first. Raises `Problem` at once for a wrong request."""
    from comparator.compare import checked
    from comparator.compare import compare as start

    if not zerogpu.active():
        return start(request, cancel=cancel)
    return _until(_lent(checked(request)), cancel)


def parts(
    model: str, variant: Variant, reference: Variant, by: str, tokens: int, cancel: threading.Event
) -> Iterator[Any]:
    """What `comparator.sensitivity.measure` yields: progress, last the parts. On a lent GPU Stop ends it early, without
    them."""
    if zerogpu.active():
        return _until(_lent_parts(model, variant, reference, by, tokens), cancel)
    return _parts(model, variant, reference, by, tokens, cancel)


def _parts(model, variant, reference, by, tokens, cancel=None) -> Iterator[Any]:
    from comparator import engine
    from comparator.sensitivity import measure

    if os.getpid() != _PARENT:
        engine.get_engine.cache_clear()
    yield from measure(engine.get_engine(), model, variant, reference, by=by, tokens=tokens, cancel=cancel)


def _columns(request: Request) -> Iterator[Event]:
    """What the lent process does. Arguments and events are pickled on their way; a signal to stop cannot be."""
    from comparator import engine
    from comparator.compare import compare as start

    if os.getpid() != _PARENT:
        engine.get_engine.cache_clear()  # threads do not come along into another process, so neither does the engine
    yield from start(request)


def _seconds(request: Request) -> int:
    from comparator.engine import get_engine

    try:
        parameters = get_engine().facts(request.model).parameters
    except Problem:
        parameters = None
    return zerogpu.duration_s(request, parameters)


def _until(events: Iterator[Any], cancel: threading.Event) -> Iterator[Any]:
    """The events until Stop; what a lent process has done until then is lost with it."""
    try:
        for event in events:
            yield event
            if cancel.is_set():
                return
    finally:
        close = getattr(events, "close", None)
        if close is not None:
            close()


_lent = zerogpu.gpu(_columns, _seconds)
_lent_parts = zerogpu.gpu(_parts, zerogpu.MAX_DURATION_S)
