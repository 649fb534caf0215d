"""Several sequences decoded at once: each prompt's own prefill, as for one, then one step for all of them.

The caches are padded on the left and put together. A step of several rows rounds otherwise than one of a single row, so
how much is measured on the model itself, and a token that such a difference could turn is reported.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from comparator.core.errors import Stopped
from comparator.core.request import GenerationSettings
from comparator.decoding.generate import Stepper, decoding, interruptible
from comparator.decoding.introspect import end_of_sequence, input_device, takes_positions
from comparator.decoding.sampling import Chooser

OnLogits = Callable[[int, Any], None]  # row, its float32 logits (vocabulary,) before its next token
MOST_APART = 0.2  # relative distance of a row's logits from a single sequence's: beyond is no rounding
TIE = 4.0  # standard deviations of the rounding within which two best tokens are a near tie


@dataclass
class Row:
    """One sequence. `near_tie`: the first of its tokens that a single sequence may choose otherwise, from 0."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    near_tie: int | None = None


def answer(
    model: Any,
    prompts: Sequence[Sequence[int]],
    settings: GenerationSettings,
    cancel: threading.Event,
    on_logits: OnLogits,
    forced: Sequence[Sequence[int]] | None = None,
) -> list[Row] | None:
    """Decode, or feed the `forced` answers. None where this model's rows cannot be put together. Raises `Stopped`."""
    import torch

    rows = [Row() for _ in prompts]
    lengths = [len(f) for f in forced] if forced else [settings.max_new_tokens] * len(prompts)
    device, eos = input_device(model), set(end_of_sequence(model))
    choosers = [Chooser(model, settings, len(ids), device) for ids in prompts]
    with torch.inference_mode(), interruptible(model, cancel), decoding(model) as begin_decoding:
        stepper = _Batch.begin(model, prompts)
        if stepper is None:
            return None
        active, spread = list(range(len(prompts))), 0.0
        for step in range(max(lengths)):
            if cancel.is_set():
                raise Stopped
            for place, number in enumerate(active):
                logits, row = stepper.logits[place], rows[number]
                on_logits(number, logits)
                token = (
                    forced[number][step]
                    if forced
                    else _choose(choosers[number], prompts[number], row, logits, step, spread)
                )
                row.token_ids.append(token)
                if not forced and token in eos:
                    row.finish_reason = "eos"
                elif step + 1 == lengths[number]:
                    row.finish_reason = "length"
            going = [place for place, number in enumerate(active) if rows[number].finish_reason is None]
            if not going:
                break
            stepper.keep(going)
            active = [active[place] for place in going]
            if step == 0:
                begin_decoding()
            tokens = [rows[number].token_ids[-1] for number in active]
            stepper.step(tokens)
            if step == 0:
                spread = _rounding(model, prompts[active[0]], tokens[0], stepper.logits[0])
                if spread is None:
                    return None
    return rows


def _choose(chooser: Chooser, prompt: Sequence[int], row: Row, logits: Any, step: int, spread: float) -> int:
    import torch

    ids = torch.tensor([[*prompt, *row.token_ids]], device=logits.device)
    token = chooser(ids, logits.unsqueeze(0), step)
    if step and row.near_tie is None:
        best = logits.topk(2).values
        if float(best[0] - best[1]) <= TIE * spread:
            row.near_tie = step
    return token


def _rounding(model: Any, prompt: Sequence[int], token: int, logits: Any) -> float | None:
    """Standard deviation of what a row's logits differ by from those of a sequence alone; None where it is no rounding."""
    alone = Stepper(model, list(prompt), 1)
    alone.next_logits()
    alone.push(token)
    expected = alone.next_logits()[0]
    apart = logits - expected
    if not float(apart.norm()) <= MOST_APART * float(expected.norm()):
        return None
    return float(apart.std())


class _Batch:
    """The rows' common cache, and `logits` (rows, vocabulary) for the next token of each."""

    def __init__(self, model: Any, cache: Any, logits: Any, lengths: Any, mask: Any):
        self.model, self.cache, self.logits, self.lengths, self.mask = model, cache, logits, lengths, mask
        self._takes_positions = takes_positions(model)

    @classmethod
    def begin(cls, model: Any, prompts: Sequence[Sequence[int]]) -> _Batch | None:
        """After each prompt's own pass; None where their caches are of a kind that cannot be put together."""
        import torch
        from transformers import DynamicCache

        caches, logits = [], []
        for ids in prompts:
            alone = Stepper(model, list(ids), 0)
            logits.append(alone.next_logits()[0])
            if type(alone.cache) is not DynamicCache or any(
                type(x).__name__ != "DynamicLayer" for x in alone.cache.layers
            ):
                return None
            caches.append(alone.cache)
        longest = max(map(len, prompts))
        joined = DynamicCache(config=model.config.get_text_config(decoder=True))
        for number in range(len(caches[0].layers)):
            layers = [cache.layers[number] for cache in caches]
            keys = torch.cat([_padded(layer.keys, longest) for layer in layers])
            joined.update(keys, torch.cat([_padded(layer.values, longest) for layer in layers]), number)
        device = logits[0].device
        lengths = torch.tensor([len(ids) for ids in prompts], device=device)
        mask = (torch.arange(longest, device=device) >= (longest - lengths).unsqueeze(1)).long()
        return cls(model, joined, torch.stack(logits), lengths, mask)

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these rows alone."""
        import torch

        if len(places) == len(self.lengths):
            return
        chosen = torch.tensor(places, device=self.mask.device)
        self.cache.batch_select_indices(chosen)
        self.lengths, self.mask = self.lengths[chosen], self.mask[chosen]

    def step(self, tokens: Sequence[int]) -> None:
        import torch

        fed = torch.tensor(tokens, device=self.mask.device).unsqueeze(1)
        self.mask = torch.cat([self.mask, torch.ones_like(fed)], dim=1)
        extra = {"position_ids": self.lengths.unsqueeze(1)} if self._takes_positions else {}
        outputs = self.model(
            input_ids=fed, attention_mask=self.mask, past_key_values=self.cache, use_cache=True, **extra
        )
        self.lengths = self.lengths + 1
        self.logits = outputs.logits[:, -1].float()


def _padded(values: Any, length: int) -> Any:
    """(1, heads, tokens, width) → (1, heads, length, width), zeros in front."""
    import torch

    return torch.nn.functional.pad(values, (0, 0, length - values.shape[2], 0))
