"""Single runs for `bench`: stock `generate` and our own loop, on the same token ids, neither ending early."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from comparator.core.request import GenerationSettings
from comparator.util.compat.transformers import takes_logits_to_keep

if TYPE_CHECKING:
    from comparator.runtimes.transformers import TransformersModel


def prompt_ids(model: Any, count: int, seed: int) -> list[int]:
    """Random token ids, the same for every variant of a model."""
    import numpy as np

    vocabulary = model.get_input_embeddings().weight.shape[0]
    return np.random.default_rng(seed).integers(3, vocabulary, count).tolist()


@contextlib.contextmanager
def endless(model: Any) -> Iterator[None]:
    """Inside, no token ends the text, so that every run has the same length."""
    places = [model.generation_config, model.config, model.config.get_text_config(decoder=True)]
    before = [(p, p.eos_token_id) for p in places if hasattr(p, "eos_token_id")]
    for place, _ in before:
        place.eos_token_id = None
    try:
        yield
    finally:
        for place, value in before:
            place.eos_token_id = value


def our_run(slot: TransformersModel, ids: list[int], count: int, recorded: Any) -> Any:
    from comparator.decoding.generate import Run, stream

    made, settings = Run(), GenerationSettings(max_new_tokens=count)
    for _ in stream(slot.model, ids, settings, threading.Event(), made, recorded):
        pass
    return made


def stock_run(model: Any, ids: list[int], count: int) -> tuple[float, list[float], list[int]]:
    """transformers' own `generate`, greedy, streamed: (start, time of each token, token ids)."""
    import torch

    given = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    start, times, tokens = stock_batch(model, given, count)
    return start, times, tokens[0]


def stock_batch(model: Any, given: Any, count: int) -> tuple[float, list[float], list[list[int]]]:
    """The same for `given` (batch, tokens); token ids (batch, count)."""
    import torch
    from transformers.generation.streamers import BaseStreamer

    class Stamps(BaseStreamer):
        def __init__(self):
            self.times: list[float] = []

        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            pass

    stamps = Stamps()
    if given.device.type == "cuda":
        torch.cuda.synchronize(given.device)
    start = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=count, do_sample=False, streamer=stamps,
            pad_token_id=0, temperature=None, top_p=None, top_k=None,
        )  # fmt: skip
    return start, stamps.times[1:], out[:, given.shape[1] :].tolist()  # the first `put` is the prompt


def first_token(slot: TransformersModel, prompt_tokens: int, seed: int, pairs: int) -> dict[str, float]:
    """TTFT of our loop beside a bare forward pass over the same prompt, alternating; medians in seconds."""
    import torch

    model = slot.model
    ids = prompt_ids(model, prompt_tokens, seed)
    given = torch.tensor([ids], device=model.get_input_embeddings().weight.device)
    extra = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}

    def bare() -> float:
        _wait(given)
        start = time.perf_counter()
        with torch.inference_mode():
            model(input_ids=given, use_cache=True, **extra)
        _wait(given)
        return time.perf_counter() - start

    def ours() -> float:
        _wait(given)
        made = our_run(slot, ids, 1, None)
        return made.times_s[0] - made.start_s

    bare(), ours()
    pairs = [(bare(), ours()) for _ in range(pairs)]
    return {
        "prompt_tokens": prompt_tokens,
        "bare_forward_s": statistics.median(b for b, _ in pairs),
        "ttft_s": statistics.median(o for _, o in pairs),
        "ratio": statistics.median(o / b for b, o in pairs),
    }


def _wait(tensor: Any) -> None:
    if tensor.device.type == "cuda":
        import torch

        torch.cuda.synchronize(tensor.device)
