"""One short run before anything is timed."""

from __future__ import annotations

from typing import Any


def warm_up(model: Any, token_ids: list[int], steps: int = 2) -> None:
    """One prefill and `steps` decode steps, discarded: libraries repack, compile and choose kernels at first use, which
    must not be part of a measured latency."""
    import torch

    from comparator.decoding.generate import Stepper, decoding

    vocabulary = model.get_input_embeddings().weight.shape[0]
    with torch.inference_mode(), decoding(model) as begin_decoding:
        stepper = Stepper(model, [t % vocabulary for t in token_ids], steps)
        for step in range(steps):
            token = int(stepper.next_logits().argmax(-1))
            if step == 0:
                begin_decoding()
            if step < steps - 1:
                stepper.push(token)


WARM_UP_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8)
