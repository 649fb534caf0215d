"""Comparisons and sensitivity on this process's engine, or on a GPU that ZeroGPU lends for one call.

On ZeroGPU one call runs all columns in a process that lives as long as the call. Everywhere else this is
`comparator.comparison.runner.run` itself. Import it before torch.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from comparator.core.errors import Stopped, UserError
from comparator.core.events import Event
from comparator.core.request import Request
from comparator.core.variant import Variant
from comparator.deploy import zerogpu
from comparator.deploy.process_engine import process_engine
from comparator.engine.local import LocalEngine
from comparator.engine.protocol import Engine, OnProgress, ignore
from comparator.util import streams

_PARENT = os.getpid()


def run(request: Request, engine: Engine, cancel: threading.Event, emit: Callable[[Event], None]) -> None:
    """Run a comparison; `emit` gets its events. On ZeroGPU Stop ends it without `Done`. Raises `UserError`.

    `engine` runs it, but on ZeroGPU, where the process that gets the GPU makes its own.
    """
    from comparator.comparison import runner

    if not zerogpu.active():
        runner.run(request, engine=engine, emit=emit, cancel=cancel)
        return
    for event in until(_on_gpu(runner.checked(request)), cancel):
        emit(event)


def sensitivity(
    model: str,
    variant: Variant,
    reference: Variant,
    by: str,
    tokens: int,
    engine: Engine,
    cancel: threading.Event,
    on_progress: OnProgress = ignore,
) -> tuple:
    """`comparator.fidelity.sensitivity.measure`. Raises `UserError`, and `Stopped` at Stop."""
    from comparator.fidelity.sensitivity import measure

    if not zerogpu.active():
        return measure(
            engine, model, variant, reference, by=by, tokens=tokens, cancel=cancel, on_progress=on_progress
        )
    for progress, parts in until(_sensitivity_on_gpu(model, variant, reference, by, tokens), cancel):
        if progress is None:
            return parts
        on_progress(*progress)
    raise Stopped


def gpu_engine() -> LocalEngine:
    """The engine of the process that the GPU is lent to: threads do not survive a fork, so neither does an engine."""
    if os.getpid() != _PARENT:
        process_engine.cache_clear()
    return process_engine()


# These run in the GPU's process. Arguments and what they yield are pickled; a signal to stop cannot be.


def _sensitivity(
    model: str, variant: Variant, reference: Variant, by: str, tokens: int
) -> Iterator[tuple[tuple | None, tuple | None]]:
    """Pairs of (progress, None), the last (None, the parts)."""
    from comparator.fidelity.sensitivity import measure

    def work(emit: streams.Emit) -> None:
        parts = measure(
            gpu_engine(), model, variant, reference, by=by, tokens=tokens,
            on_progress=lambda *progress: emit((progress, None)),
        )  # fmt: skip
        emit((None, parts))

    yield from streams.iterate(work, threading.Event())


def _columns(request: Request) -> Iterator[Event]:
    from comparator.comparison.runner import compare

    yield from compare(request, engine=gpu_engine())


def _seconds(request: Request) -> int:
    try:
        parameters = process_engine().facts(request.model).parameters
    except UserError:
        parameters = None
    return zerogpu.duration_s(request, parameters)


def until(items: Iterator[Any], cancel: threading.Event) -> Iterator[Any]:
    """The items until Stop; what the GPU's process has done until then is lost with it."""
    with contextlib.closing(items) if hasattr(items, "close") else contextlib.nullcontext():
        for item in items:
            yield item
            if cancel.is_set():
                return


_on_gpu = zerogpu.gpu(_columns, _seconds)
_sensitivity_on_gpu = zerogpu.gpu(_sensitivity, zerogpu.MAX_DURATION_S)
