"""One run of one resident column: warmed up, decoded and measured."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from comparator.core.errors import Stopped
from comparator.core.messages import Generation, Prompt
from comparator.core.request import GenerationSettings
from comparator.core.result import Latency
from comparator.core.variant import Adapter
from comparator.decoding.generate import Run, interruptible, stream
from comparator.decoding.warm_up import warm_up
from comparator.metrics import bandwidth, energy, interference, latency, memory

if TYPE_CHECKING:
    from comparator.adapters.attach import Fitted
    from comparator.runtimes.transformers.resident import TransformersModel


def run_once(
    slot: TransformersModel,
    prompt: Prompt,
    settings: GenerationSettings,
    cancel: threading.Event,
    emit: Callable[[tuple[int, float]], None],
    adapter: Adapter | None = None,
) -> Generation:
    """One run of one column: warm up for this prompt's length, then decode, measured.

    Emits (token id, time) and nothing more: turning ids into text here would stand between two tokens and count
    as inter-token latency.
    """
    fitted = slot.fitted(adapter)
    warmed = slot.warmed if fitted is None else fitted.warmed
    prepare_s = _warm_for(slot, list(prompt.token_ids), cancel, warmed)
    plan = slot.decoder.plan(list(prompt.token_ids), settings, adapter, fitted)
    if plan.prepare_s is not None:
        prepare_s = (prepare_s or 0.0) + plan.prepare_s
    floor = _floor_tok_s(slot, fitted)
    held = (slot.memory.resident_bytes or 0) + (fitted.bytes if fitted else 0) + plan.held_bytes
    run = Run()
    watched = interference.watch(slot.device)
    with memory.track(slot.device) as peak, energy.metered(slot.device) as used, watched as seen:
        for item in stream(slot.model, list(prompt.token_ids), settings, cancel, run, plan.recorded):
            emit(item)
    figures = replace(
        latency.from_timestamps(run.start_s, run.times_s, len(prompt.token_ids), seen.found),
        floor_tok_s=floor,
    )
    notes = plan.notes
    if floor and figures.decode_tok_s and figures.decode_tok_s > floor:
        notes = (*notes, above_floor(figures.decode_tok_s, floor))
    if settings.decode == "both" and plan.recorded is not None and run.finish_reason != "stopped":
        figures = _eager_too(slot, prompt, settings, cancel, figures)
    return Generation(
        token_ids=tuple(run.token_ids),
        finish_reason=run.finish_reason,
        latency=figures,
        prepare_s=prepare_s,
        # What this variant holds plus how far this run rose above it: other residents do not count.
        run_peak_bytes=held + (peak.above_bytes or 0),
        kv_cache_bytes=run.kv_cache_bytes,
        decode_path=run.decode_path,
        joules_per_token=used.per_token(run.times_s),
        notes=notes,
    )


def above_floor(tok_s: float, floor_tok_s: float) -> str:
    return (
        f"{tok_s:.0f} tok/s is above the roofline of {floor_tok_s:.0f}: work was skipped, or the weights fit the "
        "GPU's cache. Not a result."
    )


def _eager_too(
    slot: TransformersModel,
    prompt: Prompt,
    settings: GenerationSettings,
    cancel: threading.Event,
    figures: Latency,
) -> Latency:
    """The same once more without the recording: what Python and its launches cost. Nothing of it is shown as text.
    Where Stop ends it, the figures stay as they are."""
    run = Run()
    for _ in stream(slot.model, list(prompt.token_ids), settings, cancel, run, None):
        pass
    if run.finish_reason == "stopped":
        return figures
    eager = latency.from_timestamps(run.start_s, run.times_s, len(prompt.token_ids))
    return replace(figures, eager_decode_tok_s=eager.decode_tok_s)


def _floor_tok_s(slot: TransformersModel, fitted: Fitted | None) -> float | None:
    """None on a CPU, and where the weights lie on several devices."""
    if slot.spread or not slot.device.startswith("cuda"):
        return None
    read = bandwidth.step_bytes(slot.model, slot.rows) + (fitted.bytes if fitted else 0)
    return bandwidth.floor_tok_s(slot.device, read)


def _warm_for(
    slot: TransformersModel, ids: list[int], cancel: threading.Event, warmed: set[int]
) -> float | None:
    """Kernels are picked by shape, so the first prompt of a length is run once before it is timed. On a CPU a
    long prefill costs seconds and gains nothing, so there 64 tokens have to do."""
    length = len(ids) if slot.device.startswith("cuda") else min(len(ids), 64)
    if length in warmed:
        return None
    start = time.perf_counter()
    with contextlib.suppress(Stopped), interruptible(slot.model, cancel):
        warm_up(slot.model, ids[:length])
        warmed.add(length)
    return time.perf_counter() - start
