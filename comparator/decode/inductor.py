"""A step through torch.compile, with what a step of one row gains from. Knows fixed steps; nothing of recording."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from comparator.decode.fixed import Fixed

# A reduction of one row of this many elements is one block's work, in one pass over its registers.
ONE_BLOCK = 16384


def compiled(fixed: Fixed) -> Callable[[], Any]:
    """The step's forward, compiled at its first call. The caller keeps it as long as what it recorded."""
    import torch
    import torch._dynamo
    import torch._inductor.config as config

    made = torch.compile(fixed.forward, dynamic=False)
    wanted = {
        # Round between fused operations where eager rounds, so that tokens stay the eager ones.
        "emulate_precision_casts": True,
        # Lets a product of one row be a fused reduction, tuned by trying: bf16 gains from it most.
        "coordinate_descent_tuning": True,
    }
    norms: Callable[[], Any] = contextlib.nullcontext
    if _has_opaque(fixed.model):
        norms = _one_pass_norms
        if hasattr(config, "combo_kernels"):
            # Small kernels that do not need each other (the rotation of q, that of k, both caches) become one.
            wanted["combo_kernels"] = True

    def step() -> Any:
        # Every model's layers share their code, and dynamo keeps a few versions of one piece of code only.
        with (
            torch._dynamo.config.patch(recompile_limit=256, accumulated_recompile_limit=4096),
            config.patch(wanted),
            norms(),
        ):
            return made()

    return step


def _has_opaque(model: Any) -> bool:
    """Whether libraries' kernels multiply, so that all that is left to the compiler is small. Where it multiplies itself,
    a norm is a part of the product beside it."""
    from comparator.decode import opaque

    return any(opaque.is_opaque(m) for m in model.modules())


def one_block(features: Any) -> bool:
    """Whether a reduction that inductor is about to write is over one row that fits a block. `features`: inductor's
    `SIMDKernelFeatures`."""
    try:
        return features.numel == 1 and int(features.reduction_numel) <= ONE_BLOCK
    except (AttributeError, TypeError):  # sizes that are not known yet
        return False


def _one_pass_norms() -> Any:
    """Inside, inductor writes a norm of one row as one pass: it would loop over more than 1,024 elements twice, and a
    norm of 4,096 then takes half as long again. What `InductorChoices` is there for; a release without it keeps its own."""
    try:
        from torch._inductor.choices import InductorChoices
        from torch._inductor.virtualized import V

        static = vars(InductorChoices)["should_use_persistent_reduction"]
        own, handler = InductorChoices.should_use_persistent_reduction, V.set_choices_handler
    except (ImportError, AttributeError, KeyError):
        return contextlib.nullcontext()
    if not isinstance(static, staticmethod):
        return contextlib.nullcontext()

    class OneRow(InductorChoices):
        @staticmethod
        def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
            return one_block(features) or own(features, cooperative_reduction)

    return handler(OneRow())
