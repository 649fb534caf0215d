"""Streams tokens from one model. Knows token ids only: nothing of text, of a page or of storage.

The loop is ours because timing it is what the project exists for: one prefill, then one token a step, each
stamped when its id has reached the host. What goes into a step (inputs, cache, logits processors) is
transformers' own, so that greedy output equals `generate` token for token.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from comparator.types import GenerationSettings, Problem, Stopped


@dataclass
class Run:
    """What a finished (or stopped) run leaves behind, beside the tokens that were yielded."""

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
    """Yield (token id, `perf_counter` when it reached the host) and fill `run` on the way.

    `recorded`: a decode step that `comparator.decode` has recorded for this model; None decodes eagerly.

    `prompt_ids`: the prompt, batch 1. Ends at an end-of-sequence token (which is yielded too), at
    `max_new_tokens`, or at Stop (`run.finish_reason == "stopped"`). Raises `Problem` when the logits hold no
    finite value.
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
            yield token, time.perf_counter()  # `choose` has waited for the device: the id is on the host
            if step == 0:
                begin_decoding()
            stepper.push(token)


class Stepper:
    """The forward passes of one sequence: first the whole prompt, then one token at a time.

    `next_logits()` is (1, vocabulary) float32 for the token after what has been pushed. `capacity` new tokens
    at most. Used by generation and by scoring, so that a column is scored the way it decodes.
    """

    def __init__(self, model: Any, prompt_ids: list[int], capacity: int):
        import torch

        self.model = model
        self.device = input_device(model)
        length = len(prompt_ids)
        # One buffer for ids and mask, sliced: growing them by `cat` costs a copy a step.
        self._ids = torch.zeros((1, length + capacity), dtype=torch.long, device=self.device)
        self._ids[0, :length] = torch.tensor(prompt_ids, dtype=torch.long)
        self._mask = torch.ones_like(self._ids)
        self._positions = torch.arange(length + capacity, device=self.device).unsqueeze(0)
        self.length = length
        self._fed = 0
        self._extra = self._first_inputs()

    def _first_inputs(self) -> dict[str, Any]:
        from transformers import DynamicCache

        extra: dict[str, Any] = {"use_cache": True}
        if self.model._supports_default_dynamic_cache():
            # transformers has not unified the argument's name: state-space models call it cache_params.
            name = "cache_params" if "mamba" in type(self.model).__name__.lower() else "past_key_values"
            extra[name] = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        if self.model._supports_logits_to_keep():
            extra["logits_to_keep"] = 1
        return extra

    @property
    def ids(self) -> Any:
        """(1, tokens so far)."""
        return self._ids[:, : self.length]

    @property
    def cache(self) -> Any:
        return self._extra.get("past_key_values", self._extra.get("cache_params"))

    def push(self, token: int) -> None:
        self._ids[0, self.length] = token
        self.length += 1

    def push_from(self, token: Any) -> None:
        """The same for a token that only the device knows yet."""
        self._ids[0, self.length : self.length + 1].copy_(token.view(1))
        self.length += 1

    def release(self) -> None:
        """Let go of the cache: somebody else has taken it over."""
        self._extra = {k: v for k, v in self._extra.items() if k not in ("past_key_values", "cache_params")}

    def next_logits(self) -> Any:
        # A copy, so that the logits of the whole prompt can go; float32 as in `generate`.
        return self._forward().logits[:, -1].to(copy=True, dtype=_float32(), device=self.device)

    def _forward(self) -> Any:
        """One forward pass over the tokens that have not been fed yet; the model's outputs."""
        first = self._fed == 0
        inputs = self.model.prepare_inputs_for_generation(
            self.ids,
            next_sequence_length=None if first else self.length - self._fed,
            attention_mask=self._mask[:, : self.length],
            is_first_iteration=first,
            **({"position_ids": self._positions[:, : self.length]} if _takes_positions(self.model) else {}),
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


def _takes_positions(model: Any) -> bool:
    known = getattr(model, "_comparator_takes_positions", None)
    if known is None:
        import inspect

        known = "position_ids" in inspect.signature(model.forward).parameters
        model._comparator_takes_positions = known
    return known


def input_device(model: Any) -> Any:
    """Where token ids go: the embedding's device, which matters when a model is spread over several."""
    return model.get_input_embeddings().weight.device


def end_of_sequence(model: Any) -> list[int]:
    """End-of-sequence ids as `generate` sees them."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config(decoder=True).eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


class Chooser:
    """Logits → the next token id on the host. Greedy, or sampled with common random numbers.

    Sampling is Gumbel-max: argmax(log p + g) is a draw from p when g is standard Gumbel noise. The noise is
    drawn by (seed, step, token id) alone, the same for every variant, so that two answers part mostly where
    their distributions do.
    """

    def __init__(self, model: Any, settings: GenerationSettings, prompt_length: int, device: Any):
        self.settings, self.device = settings, device
        self.processors = _processors(model, settings, prompt_length, device)

    def __call__(self, ids: Any, logits: Any, step: int) -> int:
        import torch

        noise = None
        if self.settings.temperature > 0:
            noise = torch.from_numpy(gumbel(self.settings.seed, step, logits.shape[-1])).to(self.device)
        top, token = self.scores(ids, logits, noise)[0].max(dim=-1)
        if not torch.isfinite(top):
            raise overflowed(step)
        return int(token)

    def scores(self, ids: Any, logits: Any, noise: Any = None) -> Any:
        """What the next token is the best of, (1, vocabulary); nothing here waits for the device."""
        import torch

        scores = self.processors(ids, logits) if self.processors else logits
        return scores if noise is None else torch.log_softmax(scores, dim=-1) + noise


def overflowed(step: int) -> Problem:
    return Problem(
        f"The logits of step {step + 1} hold NaN or infinity: this variant overflows on this prompt.",
        "Try dtype=bf16 or dtype=fp32 (fp16 has a narrow range), or another variant.",
    )


def gumbel(seed: int, step: int, size: int):
    """Standard Gumbel noise, float32 (size,): −log(−log u), u from the counter-based Philox generator.

    Entry i depends on (seed, step, i) alone, so vocabularies of different size share what they share.
    """
    import numpy as np

    uniform = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), step])).random(size)
    return (-np.log(-np.log(np.clip(uniform, 1e-300, 1.0 - 1e-16)))).astype(np.float32)


def _processors(model: Any, settings: GenerationSettings, prompt_length: int, device: Any):
    """transformers' own logits processors for these settings, with what the model's own generation config asks
    for beside sampling (suppressed tokens, forced ends); its sampling defaults are replaced by ours."""
    config = copy.deepcopy(model.generation_config)
    sampled = settings.temperature > 0
    config.update(
        do_sample=sampled,
        temperature=settings.temperature if sampled else None,
        top_p=settings.top_p if sampled and settings.top_p < 1 else None,
        top_k=settings.top_k if sampled and settings.top_k > 0 else None,
        min_p=None,
        typical_p=None,
        epsilon_cutoff=None,
        eta_cutoff=None,
        repetition_penalty=settings.repetition_penalty if settings.repetition_penalty != 1 else None,
        max_length=prompt_length + settings.max_new_tokens,
        max_new_tokens=settings.max_new_tokens,
        num_beams=1,
    )
    model._prepare_special_tokens(config, kwargs_has_attention_mask=True, device=device)
    return model._get_logits_processor(
        generation_config=config, input_ids_seq_length=prompt_length, device=device, model_kwargs={}
    )


@contextlib.contextmanager
def interruptible(model: Any, cancel: threading.Event) -> Iterator[None]:
    """Inside, Stop is honoured between two layers of a forward pass: a long prefill on a CPU takes seconds."""

    def check(*_):
        if cancel.is_set():
            raise Stopped

    handles = [layer.register_forward_pre_hook(check) for layer in decoder_layers(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: Any) -> list[Any]:
    """The stack of transformer blocks: the longest ModuleList."""
    import torch

    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []


@contextlib.contextmanager
def decoding(model: Any) -> Iterator[Any]:
    """Yields a function to call once the prefill is over. `generate` switches some mixture-of-experts kernels
    there, so we do too."""
    with contextlib.ExitStack() as stack:
        switch = getattr(model, "_optimize_model_for_decode", None)
        yield (lambda: stack.enter_context(switch())) if switch else (lambda: None)
