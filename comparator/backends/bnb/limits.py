"""What bitsandbytes' CUDA kernels cannot do, refused before they end the process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comparator.core.errors import UserError

MOST_ELEMENTS = 2**31 - 1


def refuse_many_rows(model: Any, layers: Sequence[Any]) -> None:
    """Raise `UserError` in each forward pass on CUDA of more tokens than the int8 kernels take.

    They count the elements of an activation (tokens × features) in 32 bits, and where that overflows bitsandbytes prints
    "invalid argument" and calls `exit`, which no `except` sees (0.50, `CUDA_CHECK_RETURN`).

    Args:
        layers: the model's `Linear8bitLt`.
    """
    widest = max(max(layer.in_features, layer.out_features) for layer in layers)

    def check(_: Any, args: tuple, named: dict[str, Any]) -> None:
        ids = named.get("input_ids", args[0] if args else None)
        if ids is not None and ids.device.type == "cuda":
            check_rows(ids.numel(), widest)

    model.register_forward_pre_hook(check, with_kwargs=True)


def check_rows(tokens: int, widest: int) -> None:
    """Raises `UserError` where a pass over `tokens` is too large for layers of up to `widest` features."""
    most = MOST_ELEMENTS // widest
    if tokens > most:
        raise UserError(
            f"bitsandbytes' int8 kernels take at most {most:,} tokens in one pass of this model, not {tokens:,}.",
            "Use fewer sequences at once, a shorter prompt, or another variant.",
        )
