"""Headers of a full-precision checkpoint → its linear layers, for methods that quantize every one but the output head."""

from __future__ import annotations

from comparator.sources import Checkpoint, TensorInfo

_NOT_LINEAR = ("embed", "lm_head", "output_projection", "norm", ".experts.")
_CONVOLUTIONS = ("gpt2", "openai-gpt")  # transformers' Conv1D in place of linear layers


def linears(checkpoint: Checkpoint) -> list[TensorInfo]:
    """The weights of linear layers that are quantized: all but the output head."""
    if checkpoint.model_type in _CONVOLUTIONS:
        return []
    return [
        t
        for t in checkpoint.tensors
        if len(t.shape) == 2
        and t.name.endswith(".weight")
        and not any(part in t.name for part in _NOT_LINEAR)
        and not t.name.removesuffix(".weight").endswith(("wte", "wpe"))
    ]
