"""What decoding costs on each path, beside stock `generate` in the same process and on the same model.

Runs alternate (stock, eager, graph, stock, …) and a ratio is the median of the pairs' ratios. Tokens are checked
before anything is timed, and a figure above the roofline is an error, never a result.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from comparator.benchmark import batch as benchmark_batch
from comparator.benchmark.runs import endless, first_token, our_run, prompt_ids, stock_run
from comparator.benchmark.types import PATHS, OnProgress, Options, Report, Row, Timed
from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings
from comparator.core.variant import Variant
from comparator.metrics import kernels

if TYPE_CHECKING:
    from comparator.engine.pool import Pool
    from comparator.runtimes.transformers import TransformersModel


def run(
    model: str, variants: list[Variant], options: Options, on_progress: OnProgress = lambda _: None
) -> Iterator[Report]:
    """Measure the variants one after another; yields the growing report after each. Raises `UserError` for a model that
    cannot be opened; a variant's own trouble is its row's `error`."""
    import torch

    from comparator.backends.transformers_loader import import_quietly
    from comparator.core.settings import get_settings
    from comparator.engine.placement import pick_device
    from comparator.engine.pool import Pool
    from comparator.metrics import bandwidth, environment
    from comparator.sources import open_checkpoint

    for path in options.decode:
        if path not in PATHS:
            raise UserError(f"There is no decode path “{path}”.", f"The paths are {', '.join(PATHS)}.")
    on_progress("importing torch and transformers")
    import_quietly("torch", "transformers")
    checkpoint = open_checkpoint(model, settings=get_settings())
    pool, device = Pool(get_settings()), pick_device()
    report = Report(
        model=checkpoint.source,
        parameters=checkpoint.parameters,
        options=options,
        environment=environment.read(device),
        device=device,
        copy_bytes_s=bandwidth.copy_bytes_s(device),
    )
    with torch.no_grad():  # ends with the generator: whoever called may train next
        for variant in variants:
            report.rows.append(_variant(pool, checkpoint, variant, options, on_progress))
            yield report


def _variant(pool: Pool, checkpoint: Any, variant: Variant, options: Options, on_progress: OnProgress) -> Row:
    from comparator.backends import backend_for
    from comparator.engine.explain import explain
    from comparator.engine.placement import pick_device
    from comparator.metrics import memory
    from comparator.runtimes import runtime_for
    from comparator.util import error_log

    row = Row(variant.notation)
    memory.give_back()
    before = memory.used(pick_device())
    try:
        if (runtime := runtime_for(variant)).name != "transformers":
            raise UserError(
                f"Rates are compared with transformers' generate, and {runtime.name} executes this variant."
            )
        variant = backend_for(variant).complete(variant, checkpoint)
        row.variant = variant.notation
        slot, _ = pool.load(
            checkpoint,
            variant,
            None,
            True,
            set(),
            lambda f, m: on_progress(f"{row.variant}: {m}"),
            threading.Event(),
        )
        _measure(row, slot, options, on_progress)
    except Exception as error:
        problem = error if isinstance(error, UserError) else explain(error, f"measure {row.variant}")
        row.error = str(problem)
        error_log.release(error)
    finally:
        slot = None
        pool.unload()
        row.left_after_unload_bytes = max(0, memory.used(pick_device()) - before)
    return row


def _measure(row: Row, slot: TransformersModel, options: Options, on_progress: OnProgress) -> None:
    from comparator.metrics import bandwidth

    row.kernel, row.notes, row.load_s = slot.loaded.kernel, tuple(slot.notes), slot.load_s
    row.load_peak_bytes, row.resident_bytes = slot.memory.load_peak_bytes, slot.memory.resident_bytes
    row.footprint_bytes, row.peak_source = slot.memory.footprint_bytes, slot.memory.peak_source
    row.step_bytes = bandwidth.step_bytes(slot.model, slot.rows)
    row.floor_tok_s = bandwidth.floor_tok_s(slot.device, row.step_bytes)
    if options.batch > 1:
        if row.floor_tok_s:
            row.floor_tok_s *= options.batch  # a step reads the weights once for all sequences
        with endless(slot.model):
            benchmark_batch.measure(row, slot, options, on_progress)
        for timed in row.paths:
            _against_floor(timed, row)
        return
    ids = prompt_ids(slot.model, options.prompt_tokens, options.seed)
    with endless(slot.model):
        plans = {}
        for path in options.decode:
            on_progress(f"{row.variant}: preparing {path}")
            timed, plans[path] = _prepare(slot, ids, path, options)
            row.paths.append(timed)
        on_progress(f"{row.variant}: checking tokens")
        row.stock = Timed("stock generate")
        _check(row, slot, ids, plans, options)
        _alternate(row, slot, ids, plans, options, on_progress)
        if options.profile:
            on_progress(f"{row.variant}: profiling")
            _profile(row, slot, ids, plans)
        if options.ttft_tokens:
            on_progress(f"{row.variant}: time to first token at {options.ttft_tokens}")
            row.ttft = first_token(slot, options.ttft_tokens, options.seed + 1, max(5, options.pairs))
    for timed in row.paths:
        _against_floor(timed, row)


def _prepare(slot: TransformersModel, ids: list[int], path: str, options: Options) -> tuple[Timed, Any]:
    from comparator.decoding.warm_up import warm_up

    settings = GenerationSettings(max_new_tokens=options.new_tokens, decode=path)
    start = time.perf_counter()
    warm_up(slot.model, ids)
    plan = slot.decoder.plan(ids, settings)
    timed = Timed(path, prepare_s=time.perf_counter() - start, notes=plan.notes)
    if path != "eager" and not plan.path.startswith({"graph": "cuda", "compiled": "compiled"}[path]):
        timed.error = " ".join(plan.notes)  # what it fell back to is another path, not this one
    timed.path = path if timed.error else plan.path
    return timed, plan


def _check(
    row: Row, slot: TransformersModel, ids: list[int], plans: dict[str, Any], options: Options
) -> None:
    """Greedy tokens of the whole run, before anything is timed: eager against stock, recorded against eager."""
    from comparator.decoding.verify import compare

    stock = stock_run(slot.model, ids, options.new_tokens)[2]
    eager = our_run(slot, ids, options.new_tokens, None).token_ids
    for timed, plan in zip(row.paths, plans.values(), strict=True):
        if plan.recorded is None:
            timed.check = _same(eager, stock)
            if eager != stock and stock != (again := stock_run(slot.model, ids, options.new_tokens)[2]):
                timed.check += (
                    f"; this kernel is not deterministic (generate's second run: {_same(again, stock)})"
                )
            elif timed.error is None and eager != stock:
                timed.error = f"Eager tokens are not stock generate's: {timed.check}."
            continue
        if timed.error is not None:  # what it fell back to is another row's
            continue
        check = compare(slot.model, plan.recorded, ids, options.new_tokens)
        timed.check = check.in_words()
        if (wrong := check.wrong) is not None:
            timed.error = f"Not timed: {wrong}."


def _same(ours: list[int], theirs: list[int]) -> str:
    for place, (a, b) in enumerate(zip(ours, theirs, strict=False)):
        if a != b:
            return f"token {place + 1} is {a} and generate's is {b}"
    return (
        f"{len(ours)} tokens equal"
        if len(ours) == len(theirs)
        else f"{len(ours)} tokens, generate {len(theirs)}"
    )


def _alternate(
    row: Row,
    slot: TransformersModel,
    ids: list[int],
    plans: dict[str, Any],
    options: Options,
    on_progress: OnProgress,
) -> None:
    from comparator.metrics import energy, memory

    todo = [(t, p) for t, p in zip(row.paths, plans.values(), strict=True) if t.error is None]
    ttfts: dict[str, list[float]] = {}
    joules: dict[str, list[float]] = {}
    for number in range(options.pairs):
        on_progress(f"{row.variant}: pair {number + 1} of {options.pairs}")
        with memory.track(slot.device) as peak, energy.metered(slot.device) as used:
            start, times, _ = stock_run(slot.model, ids, options.new_tokens)
        _note(row.stock, start, times, peak, used, 0, slot, ttfts, joules)
        for timed, plan in todo:
            with memory.track(slot.device) as peak, energy.metered(slot.device) as used:
                made = our_run(slot, ids, options.new_tokens, plan.recorded)
            _note(timed, made.start_s, made.times_s, peak, used, plan.held_bytes, slot, ttfts, joules)
            timed.kv_cache_bytes = made.kv_cache_bytes
    for timed in [row.stock, *(t for t, _ in todo)]:
        timed.ttft_s = statistics.median(ttfts[timed.path])
        timed.decode_tok_s = statistics.median(timed.runs)
        timed.ratio = statistics.median(a / b for a, b in zip(timed.runs, row.stock.runs, strict=True))
        timed.joules_per_token = statistics.median(joules[timed.path]) if timed.path in joules else None


def _note(timed, start, times, peak, used, held, slot, ttfts, joules) -> None:
    timed.runs.append((len(times) - 1) / (times[-1] - times[0]))
    ttfts.setdefault(timed.path, []).append(times[0] - start)
    timed.run_peak_bytes = max(
        timed.run_peak_bytes or 0, (slot.memory.resident_bytes or 0) + held + (peak.above_bytes or 0)
    )
    if (each := used.per_token(times)) is not None:
        joules.setdefault(timed.path, []).append(each)


def _profile(row: Row, slot: TransformersModel, ids: list[int], plans: dict[str, Any]) -> None:
    """Kernel by kernel, a step of each path that was timed."""
    import torch

    from comparator.decoding.generate import Stepper, decoding

    steps = 8
    for timed, plan in zip(row.paths, plans.values(), strict=True):
        if timed.error is not None:
            continue
        with torch.inference_mode(), decoding(slot.model) as begin_decoding:
            stepper = Stepper(slot.model, ids, 2 * steps + 3)
            token = int(stepper.next_logits().argmax(-1))
            begin_decoding()
            stepper.push(token)
            if plan.recorded is None:

                def step(stepper=stepper):
                    stepper.push(int(stepper.next_logits().argmax(-1)))

            elif plan.recorded.fixed.capacity < len(ids) + 2 * steps + 2:
                continue
            else:
                plan.recorded.fixed.fill(stepper.cache, len(ids), token, plan.recorded.fixed.logits.shape[-1])
                step = plan.recorded.replay
            timed.profile = kernels.profile(step, slot.device, steps)


def _against_floor(timed: Timed, row: Row) -> None:
    if not row.floor_tok_s or not timed.decode_tok_s:
        return
    timed.floor_share = timed.decode_tok_s / row.floor_tok_s
    if timed.floor_share > 1:
        timed.error = (
            f"{timed.decode_tok_s:.0f} tok/s is above the roofline of {row.floor_tok_s:.0f}: work was skipped, or the "
            "weights fit the cache. Not a result."
        )
        timed.decode_tok_s = timed.ratio = timed.floor_share = None
