"""Chooses and prepares the decode path, and caches captured steps. One `Decoder` per resident model.

A captured step is compared with the eager path on the prompt that it is captured for, and not used if its logits differ
by more than rounding explains.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from comparator.core.request import GenerationSettings
from comparator.decoding import fused_ops, parallel_streams
from comparator.decoding.cuda_graph import CapturedStep
from comparator.decoding.static_state import StaticDecodeState, bucket, refusal
from comparator.decoding.verify import Check, compare
from comparator.util import cuda_errors, error_log, formatting

KEEP = 6  # captured steps per model; the least recently used is dropped


@dataclass(frozen=True)
class Plan:
    """How one run decodes. `recorded`: the captured step, None: eagerly. `prepare_s` None: nothing had to be prepared."""

    path: str = "eager"
    recorded: CapturedStep | None = None
    prepare_s: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def held_bytes(self) -> int:
        """Device memory beside the model: the static cache, and the graph's own."""
        return self.recorded.fixed.bytes + self.recorded.graph_bytes if self.recorded else 0


class Decoder:
    """`plan(...)` before a run; the model must not change between `plan` and the run (adapters switched, say)."""

    def __init__(self, model: Any, device: str):
        self.model, self.device = model, device
        self.states: dict[int, StaticDecodeState] = {}
        self.captured: OrderedDict[tuple, tuple[CapturedStep, tuple[str, ...]]] = OrderedDict()
        self.refused: dict[tuple, str] = {}
        self.checks: dict[tuple, Check] = {}

    @property
    def bytes(self) -> int:
        """Keys and values of the caches of captured steps, and the graphs' own memory."""
        return sum(s.bytes for s in self.states.values()) + sum(
            r.graph_bytes for r, _ in self.captured.values()
        )

    def plan(
        self, prompt_ids: list[int], settings: GenerationSettings, adapter: Any = None, fitted: Any = None
    ) -> Plan:
        """The path that `settings.decode` requests, prepared; or the eager one with the reason in its notes.

        `adapter` (hashable) is active in the model now, `fitted` is the object that holds its weights: a captured step is
        valid for these alone.
        """
        requested = settings.decode
        if requested == "eager":
            return Plan()
        if not self.device.startswith("cuda"):
            reasons = (
                ()
                if requested in ("auto", "both")
                else (f"Decoded eagerly: a CUDA graph needs a CUDA device, this is {self.device}.",)
            )
            return Plan(notes=reasons)
        capacity = bucket(len(prompt_ids) + settings.max_new_tokens)
        base = (capacity, adapter, id(fitted), is_plain(self.model, settings))
        start, fresh, notes = time.perf_counter(), False, ()
        for compiled in (True, False):
            key = (*base, compiled)
            # `auto` uses a compiled step that was requested before: it is compiled already.
            if compiled and requested != "compiled" and key not in self.captured:
                continue
            if key not in self.captured and key not in self.refused:
                fresh = True
                self._try(key, prompt_ids, fitted)
            prepare_s = time.perf_counter() - start if fresh else None
            if key in self.captured:
                self.captured.move_to_end(key)
                recorded, step_notes = self.captured[key]
                return Plan(recorded.path, recorded, prepare_s, notes + step_notes)
            outcome = "Not compiled" if compiled else "Decoded eagerly"
            notes += (f"{outcome}: {self.refused[key]}.",)
        return Plan(prepare_s=prepare_s, notes=notes)

    def _try(self, key: tuple, prompt_ids: list[int], fitted: Any) -> None:
        """Capture a step under `key`, or store why it cannot be captured."""
        try:
            recorded = self._make(key, prompt_ids)
        except NotCapturable as reason:
            self.refused[key] = str(reason)
            error_log.fallback("decode without torch.compile" if key[-1] else "decode eagerly", reason)
            error_log.release(reason)
        else:
            recorded.keep_alive.append(fitted)  # its id must stay its own

    def _make(self, key: tuple, prompt_ids: list[int]) -> CapturedStep:
        import torch

        capacity, _, _, greedy, compiled = key
        while len(self.captured) >= KEEP:
            self.forget(next(iter(self.captured)))
        try:
            if reason := refusal(self.model, capacity):
                raise NotCapturable(reason)
            recorded, notes, check = record(self.model, self._state(capacity), prompt_ids, compiled, greedy)
        except NotCapturable:
            self._drop_unused()
            raise
        except torch.OutOfMemoryError as error:
            self._drop_unused()
            raise NotCapturable("there is no memory left for a static cache and a graph") from error
        except Exception as error:  # a library that cannot be captured must not fail the column
            if cuda_errors.is_context_damaged(error):
                raise
            self._drop_unused()
            raise NotCapturable(f"it cannot be captured ({formatting.first_line(error, 160)})") from error
        if (wrong := check.wrong) is not None:
            self._drop_unused()
            raise NotCapturable(wrong)
        if check.first_difference is not None:
            notes += (f"Against eager decoding, {check.in_words()}.",)
        self.captured[key], self.checks[key] = (recorded, notes), check
        return recorded

    def _state(self, capacity: int) -> StaticDecodeState:
        if capacity not in self.states:
            self.states[capacity] = StaticDecodeState(self.model, capacity)
        return self.states[capacity]

    def forget(self, key: tuple | None = None) -> None:
        """Drop one captured step, or all, with the memory that only they used."""
        if key is None:
            self.captured.clear()
            self.refused.clear()
        else:
            self.captured.pop(key)
        self._drop_unused()

    def _drop_unused(self) -> None:
        used = {k[0] for k in self.captured}
        for capacity in [c for c in self.states if c not in used]:
            del self.states[capacity]


class NotCapturable(Exception):
    """A step cannot be captured; the message is a reason that follows “Decoded eagerly: ”."""


def is_plain(model: Any, settings: GenerationSettings) -> bool:
    """Whether the next token is the argmax of the logits: then the argmax is captured too."""
    config = model.generation_config
    forced = ("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "bad_words_ids",
              "sequence_bias", "no_repeat_ngram_size", "min_length", "min_new_tokens",
              "exponential_decay_length_penalty", "guidance_scale", "encoder_repetition_penalty")  # fmt: skip
    return (
        settings.temperature == 0
        and settings.repetition_penalty == 1
        and not any(getattr(config, name, None) not in (None, 0, 1, 1.0, [], {}) for name in forced)
        and not getattr(config, "remove_invalid_values", False)
    )


def record(
    model: Any, fixed: StaticDecodeState, prompt_ids: list[int], compiled: bool, greedy: bool
) -> tuple[CapturedStep, tuple[str, ...], Check]:
    """Prefill, warm the step up, capture it, and compare it with eager decoding on this prompt."""
    import torch

    from comparator.decoding.generate import Stepper, decoding

    with torch.inference_mode(), decoding(model) as begin_decoding:
        stepper = Stepper(model, prompt_ids, 2)
        first = stepper.next_logits()
        begin_decoding()
        fixed.fill(stepper.cache, stepper.length, int(first.argmax(-1)), first.shape[-1])
        recorded = capture(model, fixed, compiled, greedy)
    check = compare(model, recorded, prompt_ids)
    return recorded, recorded.notes, check


def capture(model: Any, fixed: StaticDecodeState, compiled: bool, greedy: bool) -> CapturedStep:
    """Replace the layers that cannot be captured, find what can be fused or run on parallel streams in the step of a filled
    `fixed`, warm it up and capture it. Call inside `decoding` and inference mode."""
    import torch

    from comparator.decoding import capture_forward, custom_ops
    from comparator.decoding import compile as decoding_compile

    cuda, step = fixed.device.type == "cuda", None
    # In a batch cuBLAS adds in another order than for one row, so no step has the bits of eager decoding.
    exact = fixed.batch == 1 and fused_ops.repeats(model)
    with contextlib.ExitStack() as stack:
        notes = stack.enter_context(capture_forward.capturable(model, fixed.batch))
        fused = fused_ops.find(model, fixed).of(fixed.capacity, compiled, exact)
        groups = parallel_streams.find(model, fixed)
        stack.enter_context(parallel_streams.applied(groups, fixed.device))
        if compiled:
            stack.enter_context(custom_ops.opaque_kernels(model))
            step = decoding_compile.compiled(fixed)
        path = "compiled-cuda-graph" if compiled else "cuda-graph"
        recorded = CapturedStep(fixed, path, greedy, step, lambda: fused_ops.applied(fused, fixed))
        recorded.notes = notes + fused.notes + ((parallel_streams.NOTE,) if groups else ())
        side = torch.cuda.Stream(fixed.device) if cuda else None
        if side:
            side.wait_stream(torch.cuda.current_stream(fixed.device))
        with torch.cuda.stream(side) if side else contextlib.nullcontext():
            recorded.step()  # compiles, picks kernels, allocates workspaces
            if cuda:
                with _forbid_synchronization(fixed.device):
                    recorded.step()
        if side:
            torch.cuda.current_stream(fixed.device).wait_stream(side)
        recorded.record()
        if step is not None:
            recorded.keep_alive.append(step)
        gc.collect()
    return recorded


@contextlib.contextmanager
def _forbid_synchronization(device: Any) -> Any:
    """A context that raises `NotCapturable` if the step synchronizes with the device, which cannot be captured."""
    import torch

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise NotCapturable(
            f"a decode step of this model synchronizes with the GPU ({_library_function(error)}), which a CUDA graph "
            "cannot contain"
        ) from error
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _library_function(error: BaseException) -> str:
    """The library's function that raised the error."""
    import traceback

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [(str(f.f_globals.get("__name__", "")).partition(".")[0], f.f_code.co_name) for f in frames]
    outside = [f"{library}: {function}" for library, function in modules if library != "comparator"]
    return outside[-1] if outside else "outside Python"
