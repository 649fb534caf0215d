"""Streams tokens from one model: one prefill, then one token per step, each timestamped when its id is on the host.

The loop replaces transformers' `generate` so that it can be timed. Inputs, cache and logits processors are transformers'
own, so that greedy output equals that of `generate` token by token.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from comparator.core.errors import Stopped
from comparator.core.request import GenerationSettings
from comparator.decoding.introspect import decoder_layers, end_of_sequence, input_device, takes_positions
from comparator.decoding.kv_cache import new_cache
from comparator.decoding.sampling import Chooser
from comparator.util.compat import transformers as compat


@dataclass
class Run:
    """Measurements of a run, filled by `stream`. Times are `perf_counter` seconds, one per token."""

    start_s: float = 0.0
    times_s: list[float] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    kv_cache_bytes: int | None = None
    decode_path: str = "eager"


def stream(
    model: Any,
    prompt_ids: list[int],
    settings: GenerationSettings,
    cancel: threading.Event,
    run: Run,
    recorded: Any = None,
) -> Iterator[tuple[int, float]]:
    """Yield (token id, `perf_counter` when it reached the host) and fill `run`.

    `prompt_ids`: the prompt, batch 1. `recorded`: a `CapturedStep` of this model; None decodes eagerly. Ends at an
    end-of-sequence token (which is yielded too), at `max_new_tokens`, or at `cancel` (`run.finish_reason` is "stopped").
    Raises `UserError` when the logits hold no finite maximum.
    """
    import torch

    stepper = Stepper(model, prompt_ids, settings.max_new_tokens)
    choose = Chooser(model, settings, len(prompt_ids), stepper.device)
    eos = set(end_of_sequence(model))
    if recorded is not None:
        run.decode_path = recorded.path
        following = recorded.tokens(stepper, choose, settings)
    else:
        following = _eager(model, stepper, choose, settings.max_new_tokens)
    try:
        with torch.inference_mode(), interruptible(model, cancel):
            run.start_s = time.perf_counter()
            for token, now in following:
                run.times_s.append(now)
                run.token_ids.append(token)
                yield token, now
                if token in eos:
                    run.finish_reason = "eos"
                    break
                if cancel.is_set():
                    run.finish_reason = "stopped"
                    break
            else:
                run.finish_reason = "length"
    except Stopped:
        run.finish_reason = "stopped"
    finally:
        following.close()
        from comparator.metrics.memory import cache_bytes

        run.kv_cache_bytes = recorded.fixed.bytes if recorded is not None else cache_bytes(stepper.cache)


def _eager(model: Any, stepper: Stepper, choose: Chooser, count: int) -> Iterator[tuple[int, float]]:
    with decoding(model) as begin_decoding:
        for step in range(count):
            token = choose(stepper.ids, stepper.next_logits(), step)
            yield token, time.perf_counter()  # `choose` has synchronized: the id is on the host
            if step == 0:
                begin_decoding()
            stepper.push(token)


class Stepper:
    """The forward passes of one sequence: first the whole prompt, then one token at a time.

    `next_logits()` is (1, vocabulary) float32 for the token after those pushed, at most `capacity` new ones. Generation
    and scoring both use it, so that a column is scored the way it decodes.
    """

    def __init__(self, model: Any, prompt_ids: list[int], capacity: int):
        import torch

        self.model = model
        self.device = input_device(model)
        self._takes_positions = takes_positions(model)
        length = len(prompt_ids)
        # One buffer for ids and mask, sliced: growing them by `cat` costs a copy per step.
        self._ids = torch.zeros((1, length + capacity), dtype=torch.long, device=self.device)
        self._ids[0, :length] = torch.tensor(prompt_ids, dtype=torch.long)
        self._mask = torch.ones_like(self._ids)
        self._positions = torch.arange(length + capacity, device=self.device).unsqueeze(0)
        self.length = length
        self._fed = 0
        self._extra = self._first_inputs()

    def _first_inputs(self) -> dict[str, Any]:
        extra: dict[str, Any] = {"use_cache": True}
        if compat.takes_dynamic_cache(self.model):
            # transformers has not unified the argument's name: state-space models call it cache_params.
            name = "cache_params" if "mamba" in type(self.model).__name__.lower() else "past_key_values"
            extra[name] = new_cache(self.model)
        if compat.takes_logits_to_keep(self.model):
            extra["logits_to_keep"] = 1
        return extra

    @property
    def ids(self) -> Any:
        """Prompt and pushed tokens, (1, length)."""
        return self._ids[:, : self.length]

    @property
    def cache(self) -> Any:
        return self._extra.get("past_key_values", self._extra.get("cache_params"))

    def push(self, token: int) -> None:
        self._ids[0, self.length] = token
        self.length += 1

    def push_from(self, token: Any) -> None:
        """`push` for a token that is on the device only."""
        self._ids[0, self.length : self.length + 1].copy_(token.view(1))
        self.length += 1

    def release(self) -> None:
        """Drop the cache, whose keys and values have been copied to a `StaticDecodeState`."""
        self._extra = {k: v for k, v in self._extra.items() if k not in ("past_key_values", "cache_params")}

    def next_logits(self) -> Any:
        # A copy, so that the logits of the whole prompt can be freed; float32 as in `generate`.
        return self._forward().logits[:, -1].to(copy=True, dtype=_float32(), device=self.device)

    def _forward(self) -> Any:
        """One forward pass over the tokens that have not been processed yet; the model's outputs."""
        first = self._fed == 0
        inputs = self.model.prepare_inputs_for_generation(
            self.ids,
            next_sequence_length=None if first else self.length - self._fed,
            attention_mask=self._mask[:, : self.length],
            is_first_iteration=first,
            **({"position_ids": self._positions[:, : self.length]} if self._takes_positions else {}),
            **self._extra,
        )
        outputs = self.model(**inputs, return_dict=True)
        self._fed = self.length
        self._keep_cache(outputs)
        return outputs

    def _keep_cache(self, outputs: Any) -> None:
        for name in ("past_key_values", "cache_params"):
            if getattr(outputs, name, None) is not None:
                self._extra[name] = getattr(outputs, name)


def _float32() -> Any:
    import torch

    return torch.float32


@contextlib.contextmanager
def interruptible(model: Any, cancel: threading.Event) -> Iterator[None]:
    """A context in which `cancel` raises `Stopped` between two layers of a forward pass: a long prefill takes seconds."""

    def check(*_):
        if cancel.is_set():
            raise Stopped

    handles = [layer.register_forward_pre_hook(check) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[Any]:
    """Yields a function to call after the prefill, where `generate` switches some mixture-of-experts kernels."""
    with contextlib.ExitStack() as stack:
        yield lambda: stack.enter_context(compat.decode_kernels(model))
