"""Decides how a column decodes, prepares it, and keeps what it prepared. One `Decoder` per resident model.

Nothing is trusted unseen: a recorded step is checked against the eager path on the very prompt it is made for, and
not used where its logits are further off than rounding explains.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from comparator.decode import abreast, fused
from comparator.decode.check import Check, compare
from comparator.decode.fixed import Fixed, bucket, refusal
from comparator.decode.graph import Recorded
from comparator.types import GenerationSettings

KEEP = 6  # recordings per model; the least recently used goes


@dataclass(frozen=True)
class Plan:
    """How one run decodes. `recorded` None: eagerly. `prepare_s` None: nothing had to be prepared."""

    path: str = "eager"
    recorded: Recorded | None = None
    prepare_s: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def held_bytes(self) -> int:
        """What it keeps on the device beside the model: the static cache, and the graph's own memory."""
        return self.recorded.fixed.bytes + self.recorded.graph_bytes if self.recorded else 0


class Decoder:
    """`plan(...)` before a run; the model must not change between `plan` and the run (adapters switched, say)."""

    def __init__(self, model: Any, device: str):
        self.model, self.device = model, device
        self.states: dict[int, Fixed] = {}
        self.made: OrderedDict[tuple, tuple[Recorded, tuple[str, ...]]] = OrderedDict()
        self.refused: dict[tuple, str] = {}
        self.checks: dict[tuple, Check] = {}

    @property
    def bytes(self) -> int:
        """Keys and values of the caches that recordings use, and the graphs' own memory."""
        return sum(s.bytes for s in self.states.values()) + sum(r.graph_bytes for r, _ in self.made.values())

    def plan(
        self, prompt_ids: list[int], settings: GenerationSettings, adapter: Any = None, worn: Any = None
    ) -> Plan:
        """The path that `settings.decode` asks for, prepared; or the eager one and why.

        `adapter` (hashable) is what is switched on in the model now, `worn` the object that holds its weights: a
        recording holds for these alone.
        """
        wish = settings.decode
        if wish == "eager":
            return Plan()
        if not self.device.startswith("cuda"):
            asked = (
                ()
                if wish in ("auto", "both")
                else (f"Decoded eagerly: a CUDA graph needs a CUDA device, this is {self.device}.",)
            )
            return Plan(notes=asked)
        capacity = bucket(len(prompt_ids) + settings.max_new_tokens)
        base = (capacity, adapter, id(worn), is_plain(self.model, settings))
        start, fresh, notes = time.perf_counter(), False, ()
        for compiled in (True, False):
            key = (*base, compiled)
            # A compiled step that was asked for before is paid for, so `auto` takes it.
            if compiled and wish != "compiled" and key not in self.made:
                continue
            if key not in self.made and key not in self.refused:
                fresh = True
                self._try(key, prompt_ids, worn)
            prepare_s = time.perf_counter() - start if fresh else None
            if key in self.made:
                self.made.move_to_end(key)
                recorded, said = self.made[key]
                return Plan(recorded.path, recorded, prepare_s, notes + said)
            missed = "Not compiled" if compiled else "Decoded eagerly"
            notes += (f"{missed}: {self.refused[key]}.",)
        return Plan(prepare_s=prepare_s, notes=notes)

    def _try(self, key: tuple, prompt_ids: list[int], worn: Any) -> None:
        """Record a step under `key`, or remember why it cannot be."""
        try:
            recorded = self._make(key, prompt_ids)
        except NotCapturable as reason:
            self.refused[key] = str(reason)
        else:
            recorded.kept.append(worn)  # its id must stay its own

    def _make(self, key: tuple, prompt_ids: list[int]) -> Recorded:
        import torch

        capacity, _, _, greedy, compiled = key
        while len(self.made) >= KEEP:
            self.forget(next(iter(self.made)))
        try:
            if reason := refusal(self.model, capacity):
                raise NotCapturable(reason)
            recorded, notes, check = record(self.model, self._state(capacity), prompt_ids, compiled, greedy)
        except NotCapturable:
            self._drop_unused()
            raise
        except torch.OutOfMemoryError:
            self._drop_unused()
            raise NotCapturable("there is no memory left for a static cache and a graph") from None
        except Exception as error:  # a library that cannot be captured must not cost the column its result
            self._drop_unused()
            raise NotCapturable(f"it cannot be captured ({_first_line(error)})") from None
        if (wrong := check.wrong) is not None:
            self._drop_unused()
            raise NotCapturable(wrong)
        if check.first_difference is not None:
            notes += (f"Against eager decoding, {check.in_words()}.",)
        self.made[key], self.checks[key] = (recorded, notes), check
        return recorded

    def _state(self, capacity: int) -> Fixed:
        if capacity not in self.states:
            self.states[capacity] = Fixed(self.model, capacity)
        return self.states[capacity]

    def forget(self, key: tuple | None = None) -> None:
        """Drop one recording, or all, with the memory only they used."""
        if key is None:
            self.made.clear()
            self.refused.clear()
        else:
            self.made.pop(key)
        self._drop_unused()

    def _drop_unused(self) -> None:
        used = {k[0] for k in self.made}
        for capacity in [c for c in self.states if c not in used]:
            del self.states[capacity]


class NotCapturable(Exception):
    """Why a step cannot be recorded, in words that follow “Decoded eagerly: ”."""


def is_plain(model: Any, settings: GenerationSettings) -> bool:
    """Whether the next token is simply the best logit: then the choice goes into the graph."""
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
    model: Any, fixed: Fixed, prompt_ids: list[int], compiled: bool, greedy: bool
) -> tuple[Recorded, tuple[str, ...], Check]:
    """Prefill, warm the step up, record it, and compare it with eager decoding on this prompt."""
    import torch

    from comparator.decode import int8
    from comparator.generate import Stepper, decoding

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        begin_decoding = stack.enter_context(decoding(model))
        stepper = Stepper(model, prompt_ids, 2)
        first = stepper.next_logits()
        begin_decoding()
        notes = stack.enter_context(int8.capturable(model))
        fixed.fill(stepper.cache, stepper.length, int(first.argmax(-1)), first.shape[-1])
        recorded = capture(model, fixed, compiled, greedy)
    check = compare(model, recorded, prompt_ids)
    return recorded, notes + recorded.notes, check


def capture(model: Any, fixed: Fixed, compiled: bool, greedy: bool) -> Recorded:
    """See what of the step of a filled `fixed` can be fused and what can run side by side, warm it up and record it;
    inside `decoding` and inference mode."""
    import torch

    from comparator.decode import inductor, opaque

    cuda, step = fixed.device.type == "cuda", None
    found = fused.find(model, fixed).of(fixed.capacity, compiled, fused.repeats(model))
    groups = abreast.find(model, fixed)
    with contextlib.ExitStack() as stack:
        stack.enter_context(abreast.applied(groups, fixed.device))
        if compiled:
            stack.enter_context(opaque.opaque_kernels(model))
            step = inductor.compiled(fixed)
        path = "compiled-cuda-graph" if compiled else "cuda-graph"
        recorded = Recorded(fixed, path, greedy, step, lambda: fused.applied(found, fixed))
        recorded.notes = found.notes + ((abreast.NOTE,) if groups else ())
        side = torch.cuda.Stream(fixed.device) if cuda else None
        if side:
            side.wait_stream(torch.cuda.current_stream(fixed.device))
        with torch.cuda.stream(side) if side else contextlib.nullcontext():
            recorded.step()  # compiles, picks kernels, allocates workspaces
            if cuda:
                with _no_waiting(fixed.device):
                    recorded.step()
        if side:
            torch.cuda.current_stream(fixed.device).wait_stream(side)
        recorded.record()
        if step is not None:
            recorded.kept.append(step)
        gc.collect()
    return recorded


@contextlib.contextmanager
def _no_waiting(device: Any) -> Any:
    """Raise `NotCapturable` where the step waits for the device, which no graph can hold."""
    import torch

    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        raise NotCapturable(
            f"a decode step of this model waits for the GPU in the middle ({_where(error)}), which a graph cannot hold"
        ) from None
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _where(error: BaseException) -> str:
    """The function of a library in which it happened."""
    import traceback

    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/comparator/" not in f.filename]
    if not frames:
        return "outside Python"
    library = frames[-1].filename.split("site-packages/")[-1].split("/")[0]
    return f"{library}: {frames[-1].name}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
