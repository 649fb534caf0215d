"""Compiles a decode step with torch.compile, with inductor's options that suit one row."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from comparator.util.compat import torch as compat

if TYPE_CHECKING:
    from comparator.decoding.static_state import StaticDecodeState

# Inductor reduces one row of up to this many elements with one block, in one pass over registers.
ONE_BLOCK = 16384


def compiled(fixed: StaticDecodeState) -> Callable[[], Any]:
    """The step's forward, compiled at its first call. It has to live as long as the graph that is captured from it."""
    import torch

    forward = torch.compile(fixed.forward, dynamic=False)
    options = {
        # Round between fused operations where eager rounds, so that tokens stay the eager ones.
        "emulate_precision_casts": True,
        # Lets a GEMV be a fused reduction with a tuned configuration: bf16 gains most.
        "coordinate_descent_tuning": True,
    }
    norms: Callable[[], Any] = contextlib.nullcontext
    if _has_opaque(fixed.model):
        norms = one_pass_norms
        # Independent small kernels (the rotation of q, that of k, both caches) become one.
        options["combo_kernels"] = True

    def step() -> Any:
        with compat.compiler_options(**options), norms():
            return forward()

    return step


def one_pass_norms() -> Any:
    """A context in which inductor generates a norm of one row as one pass. By default it loops twice over more than
    1,024 elements, which makes a norm of 4,096 1.5 × as slow."""
    return compat.persistent_reductions(one_block)


def _has_opaque(model: Any) -> bool:
    """Whether matmuls are libraries' own kernels, which leaves only small ones to the compiler. Where it compiles the
    matmuls too, it fuses norms with them."""
    from comparator.decoding import custom_ops

    return any(custom_ops.is_opaque(m) for m in model.modules())


def one_block(features: Any) -> bool:
    """Whether inductor's reduction is over one row that fits a block. `features`: inductor's `SIMDKernelFeatures`."""
    try:
        return features.numel == 1 and int(features.reduction_numel) <= ONE_BLOCK
    except (AttributeError, TypeError):  # sizes that are not known yet
        return False
