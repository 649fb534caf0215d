"""Logits → the next token id: transformers' own logits processors, greedy or Gumbel-max sampling with common
random numbers.
"""

from __future__ import annotations

import copy
from typing import Any

from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings
from comparator.util.compat import transformers as compat


class Chooser:
    """Logits (1, vocabulary) → the next token id on the host. Greedy, or sampled with common random numbers.

    Sampling is Gumbel-max: argmax(log p + g) is a draw from p when g is standard Gumbel noise. The noise depends
    on (seed, step, token id) alone and is the same for every variant, so that two answers differ mostly where
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
        """Scores (1, vocabulary) whose maximum is the next token. Does not synchronize with the device."""
        import torch

        scores = self.processors(ids, logits) if self.processors else logits
        return scores if noise is None else torch.log_softmax(scores, dim=-1) + noise


def overflowed(step: int) -> UserError:
    return UserError(
        f"The logits of step {step + 1} contain NaN or infinity: this variant overflows on this prompt.",
        "Try dtype=bf16 or dtype=fp32 (fp16 has a narrow range), or another variant.",
    )


def gumbel(seed: int, step: int, size: int):
    """Standard Gumbel noise, float32 (size,): −log(−log u), u from the counter-based Philox generator.

    Entry i depends on (seed, step, i) alone, so vocabularies of different size get the same noise where they overlap.
    """
    import numpy as np

    uniform = np.random.Generator(np.random.Philox(key=[seed & (2**64 - 1), step])).random(size)
    return (-np.log(-np.log(np.clip(uniform, 1e-300, 1.0 - 1e-16)))).astype(np.float32)


def _processors(model: Any, settings: GenerationSettings, prompt_length: int, device: Any):
    """transformers' logits processors for these settings and the model's generation config (suppressed tokens, forced
    ends), whose sampling defaults are overridden."""
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
    return compat.logits_processors(model, config, prompt_length, device)
