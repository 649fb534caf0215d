"""Sequences of one length decoded at once, for timing: nothing is padded, and no token ends one of them.

On CUDA the step is captured for this batch, after its logits were compared with the eager ones.
"""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any

from comparator.core.errors import Stopped
from comparator.decoding.generate import decoding, interruptible
from comparator.decoding.kv_cache import new_cache
from comparator.decoding.planner import NotCapturable, capture
from comparator.decoding.static_state import StaticDecodeState, bucket, refusal
from comparator.util import cuda_errors, error_log
from comparator.util.compat.transformers import takes_logits_to_keep

CHECKED = 16  # steps whose logits are compared
Ran = tuple[float, list[float], list[list[int]]]  # start, time of each step, tokens (steps, batch)


class TimedBatch:
    """Prefills `prompts` (batch, tokens) int64, then decodes `count` tokens of each sequence, greedily.

    Attributes:
        path: "eager" or "cuda-graph". note: how far a captured step is from the eager one, or why none was captured.
    """

    def __init__(self, model: Any, prompts: Any, count: int, cancel: threading.Event):
        self.model, self.prompts, self.count, self.cancel = model, prompts, count, cancel
        self.path, self.note = "eager", ""
        self._recorded: Any = None
        self._cache: Any = None
        self._first: Any = None  # (batch,) the tokens after the prompts
        if prompts.device.type == "cuda":
            self._capture()

    def prefill(self) -> float:
        """One pass over all prompts; returns the seconds until every sequence's first token is on the host."""
        import torch

        self._cache = None  # of the pass before: two would be held at once
        with torch.inference_mode(), interruptible(self.model, self.cancel), decoding(self.model):
            start = begin(self.prompts)
            self._cache, logits = prefill(self.model, self.prompts)
            self._first = logits.argmax(-1)
            self._first.tolist()
            return time.perf_counter() - start

    def decode(self, count: int | None = None) -> Ran:
        """Decode from the prompts' end; may be called again. The first tokens are the prefill's, so there are `count` - 1
        steps. Raises `Stopped`."""
        import torch

        count = count or self.count
        if self._cache is None:
            self.prefill()
        with (
            torch.inference_mode(),
            interruptible(self.model, self.cancel),
            decoding(self.model) as begin_decoding,
        ):
            begin_decoding()
            ran = (self._eager if self._recorded is None else self._replayed)(count)
        self._rewind()
        return ran

    def _eager(self, count: int) -> Ran:
        token, times = self._first, []
        tokens = [token.tolist()]
        start = begin(self.prompts)
        for _ in range(1, count):
            if self.cancel.is_set():
                raise Stopped
            token = step(self.model, self._cache, token.view(-1, 1)).argmax(-1)
            tokens.append(token.tolist())  # waits for the device: the ids are on the host
            times.append(time.perf_counter())
        return start, times, tokens

    def _replayed(self, count: int) -> Ran:
        """The host stays one step behind the device."""
        from comparator.decoding.cuda_graph import DecodePipeline

        fixed, times, tokens = self._recorded.fixed, [], [self._first.tolist()]
        fixed.fill(self._cache, self.prompts.shape[1], self._first, fixed.logits.shape[-1])
        line = DecodePipeline(self._recorded)
        start = begin(self.prompts)
        if count > 1:
            line.launch(1)
        for number in range(1, count):
            if self.cancel.is_set():
                raise Stopped
            if number + 1 < count:
                line.launch(number + 1)
            tokens.append(line.read_all(number))
            times.append(time.perf_counter())
        return start, times, tokens

    def _rewind(self) -> None:
        """The cache as after the prompts; a kind that cannot be cut is filled again before the next run."""
        if self._recorded is not None:  # it has a cache of its own
            return
        if all(type(layer).__name__ == "DynamicLayer" for layer in self._cache.layers):
            self._cache.crop(
                self.prompts.shape[1] - self._cache.get_seq_length()
            )  # negative: how many to remove
        else:
            self._cache = None

    def _capture(self) -> None:
        try:
            self._recorded, self.note = record(self.model, self.prompts, self.count, compiled=False)
        except Exception as error:  # a library that cannot be captured must not fail the measurement
            if isinstance(error, Stopped) or cuda_errors.is_context_damaged(error):
                raise
            reason = (
                str(error)
                if isinstance(error, NotCapturable)
                else f"it cannot be captured ({type(error).__name__})"
            )
            self.note = f"Decoded eagerly: {reason}."
            error_log.fallback("decode a batch eagerly", error)
            error_log.release(error)
        else:
            self.path = self._recorded.path


def record(model: Any, prompts: Any, count: int, compiled: bool) -> tuple[Any, str]:
    """(the captured step for this batch, how far its logits are from the eager ones). Raises `NotCapturable`."""
    import torch

    from comparator.decoding import capture_forward
    from comparator.decoding.verify import explained, too_far

    batch, length = prompts.shape
    capacity = bucket(length + count)
    if reason := refusal(model, capacity):
        raise NotCapturable(reason)
    fixed = StaticDecodeState(model, capacity, batch)
    with torch.inference_mode(), decoding(model) as begin_decoding:
        cache, logits = prefill(model, prompts)
        first, vocabulary = logits.argmax(-1), logits.shape[-1]
        begin_decoding()
        fixed.fill(cache, length, first, vocabulary)
        recorded = capture(model, fixed, compiled, True)
        fixed.fill(cache, length, first, vocabulary)  # capturing ran steps on it, and left `cache` alone
        layers, furthest, same, steps = None, 0.0, 0, min(CHECKED, count - 1)
        for number in range(steps):
            eager = partial(step, model, cache, fixed.token.clone())
            if number:
                expected = eager()
            else:
                expected, layers = capture_forward.largest_difference(model, eager, batch)
            recorded.replay()
            apart = (fixed.logits - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-9)
            furthest = max(furthest, float(apart.max()))
            same += int((fixed.logits.argmax(-1) == expected.argmax(-1)).sum())
        limit, _ = explained(model, fixed, furthest)
    if (wrong := too_far(furthest, limit, layers)) is not None:
        raise NotCapturable(wrong)
    return recorded, f"logits within {furthest:.1%} of eager, {same} of {steps * batch} tokens equal"


def prefill(model: Any, prompts: Any) -> tuple[Any, Any]:
    """(cache, logits (batch, vocabulary) float32 after the prompt)."""
    cache = new_cache(model)
    extra = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
    outputs = model(input_ids=prompts, past_key_values=cache, use_cache=True, **extra)
    return outputs.past_key_values, outputs.logits[:, -1].float()


def step(model: Any, cache: Any, token: Any) -> Any:
    """Logits (batch, vocabulary) float32 after `token` (batch, 1)."""
    return model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1].float()


def begin(prompts: Any) -> float:
    """The time once the device has nothing left to do."""
    import torch

    if prompts.device.type == "cuda":
        torch.cuda.synchronize(prompts.device)
    return time.perf_counter()
