"""Facts of a transformers model that decoding needs: decoder layers, input device, stop tokens, `position_ids`."""

from __future__ import annotations

import inspect
from typing import Any


def takes_positions(model: Any) -> bool:
    """Whether the forward pass takes `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def input_device(model: Any) -> Any:
    """The embedding's device, where token ids have to be; a model may be spread over several."""
    return model.get_input_embeddings().weight.device


def end_of_sequence(model: Any) -> list[int]:
    """End-of-sequence token ids, as in transformers' `generate`."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = model.config.get_text_config(decoder=True).eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def decoder_layers(model: Any) -> list[Any]:
    """The stack of transformer blocks: the longest ModuleList."""
    import torch

    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return list(max(lists, key=len)) if lists else []
