"""Headers of a full-precision checkpoint → its linear layers, for methods that quantize every one but the output head."""

from __future__ import annotations

from comparator.core.errors import UserError
from comparator.sources import Checkpoint, TensorInfo, packed

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


def require_linears(checkpoint: Checkpoint, title: str) -> None:
    """Raises `UserError` for a checkpoint that is quantized already, or has no such layer. title: of the method."""
    if checkpoint.quantization:
        raise UserError(
            f"{checkpoint.source} is quantized already ({packed.method_of(checkpoint.quantization)}), and {title} starts from "
            "full precision.",
            "Choose the full-precision model as the comparison's model.",
        )
    if not linears(checkpoint):
        raise UserError(
            f"{checkpoint.source} ({checkpoint.architecture}) has no linear layer that {title} can quantize.",
            "Use bf16, or a model with linear layers.",
        )
