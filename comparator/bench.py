"""What decoding costs on each path, beside stock `generate` in the same process and on the same model.

Runs alternate (stock, eager, graph, stock, …) and a ratio is the median of the pairs' ratios. Tokens are checked
before anything is timed, and a figure above the bandwidth floor is an error, never a result. Knows nothing of a page.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from comparator import bench_batch
from comparator.bench_runs import endless, first_token, our_run, prompt_ids, stock_run
from comparator.metrics import kernels
from comparator.types import Environment, GenerationSettings, Problem, Variant

if TYPE_CHECKING:
    from comparator.pool import Pool, Slot

PATHS = ("eager", "graph", "compiled")
Told = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """`prompt_tokens`, `new_tokens`: of the decode runs. `ttft_tokens`: prompt of the TTFT runs, 0 leaves them out."""

    decode: tuple[str, ...] = ("eager",)
    prompt_tokens: int = 128
    new_tokens: int = 128
    pairs: int = 3
    ttft_tokens: int = 0
    seed: int = 0
    batch: int = 1
    profile: bool = False


@dataclass
class Timed:
    """One path. Times in seconds; `runs` holds decode tok/s, `ratio` the median over pairs of ours ÷ stock."""

    path: str
    prepare_s: float | None = None
    ttft_s: float | None = None
    decode_tok_s: float | None = None
    runs: list[float] = field(default_factory=list)
    ratio: float | None = None
    floor_share: float | None = None
    joules_per_token: float | None = None
    run_peak_bytes: int | None = None
    kv_cache_bytes: int | None = None
    check: str = ""
    notes: tuple[str, ...] = ()
    error: str | None = None
    profile: kernels.StepProfile | None = None


@dataclass
class Row:
    """One variant."""

    variant: str
    kernel: str | None = None
    load_s: float | None = None
    load_peak_bytes: int | None = None
    resident_bytes: int | None = None
    footprint_bytes: int | None = None
    peak_source: str | None = None
    step_bytes: int | None = None
    floor_tok_s: float | None = None
    stock: Timed | None = None
    paths: list[Timed] = field(default_factory=list)
    ttft: dict[str, float] | None = None
    left_after_unload_bytes: int | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass
class Report:
    model: str
    parameters: int
    options: Options
    environment: Environment
    device: str
    copy_bytes_s: float | None
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    model: str, variants: list[Variant], options: Options, told: Told = lambda _: None
) -> Iterator[Report]:
    """Measure the variants one after another; yields the growing report after each. Raises `Problem` for a model that
    cannot be opened; a variant's own trouble is its row's `error`."""
    import torch

    from comparator.backends.loading import import_quietly
    from comparator.metrics import bandwidth, environment
    from comparator.pool import Pool, pick_device
    from comparator.settings import get_settings
    from comparator.sources import open_checkpoint

    for path in options.decode:
        if path not in PATHS:
            raise Problem(f"There is no decode path “{path}”.", f"The paths are {', '.join(PATHS)}.")
    told("importing torch and transformers")
    import_quietly("torch", "transformers")
    torch.set_grad_enabled(False)
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
    for variant in variants:
        report.rows.append(_variant(pool, checkpoint, variant, options, told))
        yield report


def _variant(pool: Pool, checkpoint: Any, variant: Variant, options: Options, told: Told) -> Row:
    from comparator.backends import backend_for
    from comparator.errors import explain
    from comparator.metrics import memory
    from comparator.pool import _used, pick_device

    row = Row(variant.notation)
    memory.give_back()
    before = _used(pick_device())
    try:
        variant = backend_for(variant).complete(variant, checkpoint)
        row.variant = variant.notation
        slot, _ = pool.load(
            checkpoint,
            variant,
            None,
            True,
            set(),
            lambda f, m: told(f"{row.variant}: {m}"),
            threading.Event(),
        )
        _measure(row, slot, options, told)
    except Exception as error:
        problem = error if isinstance(error, Problem) else explain(error, f"measure {row.variant}")
        row.error = str(problem)
        error.__traceback__ = None
    finally:
        slot = None
        pool.unload()
        row.left_after_unload_bytes = max(0, _used(pick_device()) - before)
    return row


def _measure(row: Row, slot: Slot, options: Options, told: Told) -> None:
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
            bench_batch.measure(row, slot, options, told)
        for timed in row.paths:
            _against_floor(timed, row)
        return
    ids = prompt_ids(slot.model, options.prompt_tokens, options.seed)
    with endless(slot.model):
        plans = {}
        for path in options.decode:
            told(f"{row.variant}: preparing {path}")
            timed, plans[path] = _prepare(slot, ids, path, options)
            row.paths.append(timed)
        told(f"{row.variant}: checking tokens")
        row.stock = Timed("stock generate")
        _check(row, slot, ids, plans, options)
        _alternate(row, slot, ids, plans, options, told)
        if options.profile:
            told(f"{row.variant}: profiling")
            _profile(row, slot, ids, plans)
        if options.ttft_tokens:
            told(f"{row.variant}: time to first token at {options.ttft_tokens}")
            row.ttft = first_token(slot, options.ttft_tokens, options.seed + 1, max(5, options.pairs))
    for timed in row.paths:
        _against_floor(timed, row)


def _prepare(slot: Slot, ids: list[int], path: str, options: Options) -> tuple[Timed, Any]:
    from comparator.pool import warm_up

    settings = GenerationSettings(max_new_tokens=options.new_tokens, decode=path)
    start = time.perf_counter()
    warm_up(slot.model, ids)
    plan = slot.decoder.plan(ids, settings)
    timed = Timed(path, prepare_s=time.perf_counter() - start, notes=plan.notes)
    if path != "eager" and not plan.path.startswith({"graph": "cuda", "compiled": "compiled"}[path]):
        timed.error = " ".join(plan.notes)  # what it fell back to is another path, not this one
    timed.path = path if timed.error else plan.path
    return timed, plan


def _check(row: Row, slot: Slot, ids: list[int], plans: dict[str, Any], options: Options) -> None:
    """Greedy tokens of the whole run, before anything is timed: eager against stock, recorded against eager."""
    from comparator.decode.check import compare

    stock = stock_run(slot.model, ids, options.new_tokens)[2]
    eager = our_run(slot, ids, options.new_tokens, None).token_ids
    for timed, plan in zip(row.paths, plans.values(), strict=True):
        if plan.recorded is None:
            timed.check = _same(eager, stock)
            if eager != stock and stock != (again := stock_run(slot.model, ids, options.new_tokens)[2]):
                timed.check += f"; this kernel does not repeat its own rounding (generate's second run: {_same(again, stock)})"
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
    row: Row, slot: Slot, ids: list[int], plans: dict[str, Any], options: Options, told: Told
) -> None:
    from comparator.metrics import energy, memory

    todo = [(t, p) for t, p in zip(row.paths, plans.values(), strict=True) if t.error is None]
    ttfts: dict[str, list[float]] = {}
    joules: dict[str, list[float]] = {}
    for number in range(options.pairs):
        told(f"{row.variant}: pair {number + 1} of {options.pairs}")
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


def _profile(row: Row, slot: Slot, ids: list[int], plans: dict[str, Any]) -> None:
    """Kernel by kernel, a step of each path that was timed."""
    import torch

    from comparator.generate import Stepper, decoding

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
            f"{timed.decode_tok_s:.0f} tok/s is above the bandwidth floor of {row.floor_tok_s:.0f}: work was dropped, or "
            "the weights fit the cache. Not a result."
        )
        timed.decode_tok_s = timed.ratio = timed.floor_share = None
