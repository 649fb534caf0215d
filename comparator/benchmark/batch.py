"""`bench` with several sequences at once: stock `generate`, the eager step and the recorded one on a batch.

Comparing runs one sequence; this is for the question how a variant's speed grows with the batch. The sequences have one
length and random token ids, so nothing is padded. Rates are tokens per second of all sequences together.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comparator.decoding.timed_batch import Ran, begin, prefill, record, step
from comparator.util import error_log, formatting
from comparator.util.compat.transformers import takes_dynamic_cache

if TYPE_CHECKING:
    from comparator.benchmark.types import OnProgress, Options, Row, Timed
    from comparator.runtimes.transformers import TransformersModel


def measure(row: Row, slot: TransformersModel, options: Options, on_progress: OnProgress) -> None:
    """Fill `row.stock` and `row.paths`. Called with a model that no token ends."""
    import torch

    from comparator.benchmark.runs import prompt_ids
    from comparator.benchmark.types import Timed

    model = slot.model
    device = model.get_input_embeddings().weight.device
    rows = [prompt_ids(model, options.prompt_tokens, options.seed + n) for n in range(options.batch)]
    given = torch.tensor(rows, device=device)
    count, runs = options.new_tokens, {}
    row.stock = Timed("stock generate")
    on_progress(f"{row.variant}: checking tokens")
    expected = _stock(model, given, count)[2]
    for path in options.decode:
        on_progress(f"{row.variant}: preparing {path}, batch {options.batch}")
        timed = Timed(path)
        row.paths.append(timed)
        start = time.perf_counter()
        try:
            runs[path], timed.check = _prepared(slot, given, path, options, timed)
        except Exception as error:
            timed.error = _reason(error)
            error_log.record(error, f"measure {row.variant} {path}")
            error_log.release(error)
            continue
        finally:
            timed.prepare_s = time.perf_counter() - start
        if path == "eager":
            timed.check = _agreement(runs[path]()[2], expected)
    _alternate(row, slot, given, runs, options, on_progress)


def _prepared(
    slot: TransformersModel, given: Any, path: str, options: Options, timed: Timed
) -> tuple[Callable[[], Ran], str]:
    model, count = slot.model, options.new_tokens
    if not takes_dynamic_cache(model):
        raise ValueError("this architecture keeps its state in its own kind of cache")
    if path == "eager":
        _eager(model, given, 3)
        return lambda: _eager(model, given, count), ""
    if given.device.type != "cuda":
        raise ValueError(f"a CUDA graph needs a CUDA device, this is {given.device}")
    recorded, said = record(model, given, count, path == "compiled")
    timed.path = recorded.path
    return lambda: replayed(model, recorded, given, count), said


def replayed(model: Any, recorded: Any, given: Any, count: int) -> Ran:
    """One run with the captured graph; the host stays one step behind the device."""
    import torch

    from comparator.decoding.cuda_graph import DecodePipeline
    from comparator.decoding.generate import decoding

    fixed, times, tokens = recorded.fixed, [], []
    with torch.inference_mode(), decoding(model):
        start = begin(given)
        cache, logits = prefill(model, given)
        first = logits.argmax(-1)
        tokens.append(first.tolist())
        times.append(time.perf_counter())
        fixed.fill(cache, given.shape[1], first, logits.shape[-1])
        line = DecodePipeline(recorded)
        if count > 1:
            line.launch(1)
        for number in range(1, count):
            if number + 1 < count:
                line.launch(number + 1)
            tokens.append(line.read_all(number))
            times.append(time.perf_counter())
    return start, times, tokens


def _eager(model: Any, given: Any, count: int) -> Ran:
    import torch

    from comparator.decoding.generate import decoding

    times, tokens = [], []
    with torch.inference_mode(), decoding(model) as begin_decoding:
        start = begin(given)
        cache, logits = prefill(model, given)
        for number in range(count):
            token = logits.argmax(-1)
            tokens.append(token.tolist())  # waits for the device: the ids are on the host
            times.append(time.perf_counter())
            if number == 0:
                begin_decoding()
            if number + 1 < count:
                logits = step(model, cache, token.view(-1, 1))
    return start, times, tokens


def _stock(model: Any, given: Any, count: int) -> Ran:
    from comparator.benchmark.runs import stock_batch

    start, times, tokens = stock_batch(model, given, count)
    return start, times, [list(step) for step in zip(*tokens, strict=True)]


def _agreement(ours: list[list[int]], theirs: list[list[int]]) -> str:
    """How many sequences are generate's to the end. Rounding depends on the batch's shapes alone, which are the same
    in both, but a kernel that adds atomically repeats nothing."""
    batch = len(ours[0])
    same = sum([s[n] for s in ours] == [s[n] for s in theirs] for n in range(batch))
    return f"{same} of {batch} sequences equal generate's"


def _alternate(
    row: Row, slot: TransformersModel, given: Any, runs: dict, options: Options, on_progress: OnProgress
) -> None:
    from comparator.metrics import energy, memory

    todo = [(row.stock, lambda: _stock(slot.model, given, options.new_tokens))]
    todo += [(t, runs[p]) for t, p in zip(row.paths, options.decode, strict=True) if p in runs]
    ttfts: dict[int, list[float]] = {}
    joules: dict[int, list[float]] = {}
    for number in range(options.pairs):
        on_progress(f"{row.variant}: pair {number + 1} of {options.pairs}, batch {options.batch}")
        for timed, run in todo:
            with memory.track(slot.device) as peak, energy.metered(slot.device) as used:
                start, times, _ = run()
            timed.runs.append(options.batch * (len(times) - 1) / (times[-1] - times[0]))
            ttfts.setdefault(id(timed), []).append(times[0] - start)
            held = (slot.memory.resident_bytes or 0) + (peak.above_bytes or 0)
            timed.run_peak_bytes = max(timed.run_peak_bytes or 0, held)
            if (each := used.per_token(times)) is not None:
                joules.setdefault(id(timed), []).append(each / options.batch)
    for timed, _ in todo:
        timed.ttft_s = statistics.median(ttfts[id(timed)])
        timed.decode_tok_s = statistics.median(timed.runs)
        timed.ratio = statistics.median(a / b for a, b in zip(timed.runs, row.stock.runs, strict=True))
        with contextlib.suppress(KeyError):
            timed.joules_per_token = statistics.median(joules[id(timed)])


def _reason(error: Exception) -> str:
    text = formatting.first_line(error)
    return f"Not timed: {text}."
