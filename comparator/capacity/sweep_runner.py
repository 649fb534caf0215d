"""A sweep on this process's engine, or on a GPU that ZeroGPU lends for one call. Import it before torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from comparator.capacity import sweep
from comparator.capacity.points import Options
from comparator.capacity.sweep import Sweep
from comparator.core.errors import Stopped
from comparator.core.variant import Variant
from comparator.deploy import zerogpu, zerogpu_runner
from comparator.engine.protocol import Engine, OnProgress
from comparator.util import streams


def run(
    engine: Engine,
    model: str,
    variants: Sequence[Variant],
    options: Options,
    cancel: threading.Event,
    on_progress: OnProgress,
    on_point: Callable[[Sweep], None],
    seconds: float | None = None,
) -> Sweep:
    """`comparator.capacity.sweep.run`. On ZeroGPU what was measured before Stop is kept too."""
    if not zerogpu.active():
        return sweep.run(engine, model, variants, options, cancel, on_progress, on_point, seconds)
    last: Sweep | None = None
    for progress, measured in zerogpu_runner.until(_on_gpu(model, tuple(variants), options), cancel):
        if measured is None:
            on_progress(*progress)
        else:
            last = measured
            on_point(measured)
    if last is None:
        raise Stopped
    last.stopped = len(last.points) < last.total
    return last


def _sweep(
    model: str, variants: tuple[Variant, ...], options: Options
) -> Iterator[tuple[tuple | None, Sweep | None]]:
    """In the GPU's process: pairs of (progress, None) or (None, what was measured so far)."""

    def work(emit: Callable[[Any], None]) -> None:
        sweep.run(
            zerogpu_runner.gpu_engine(), model, variants, options,
            on_progress=lambda *progress: emit((progress, None)), on_point=lambda measured: emit((None, measured)),
        )  # fmt: skip

    yield from streams.iterate(work, threading.Event())


_on_gpu = zerogpu.gpu(_sweep, zerogpu.MAX_DURATION_S)
