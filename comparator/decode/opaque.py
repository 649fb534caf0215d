"""Kernels that a compiler must not look into, made one opaque operation each while a step is compiled.

ExLlamaV2's kernel writes into a buffer without saying so; torch.compile then takes the call for one without effect
and drops it: 753 tok/s on an H100 whose memory allows 641. Wrapped as an operation that returns a new tensor,
the call stays. Used only while compiling; eager and plain-graph decoding see the library's own module.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

from comparator.decode.instead import instead

_originals: dict[int, Any] = {}
_numbers = itertools.count(1)


def is_opaque(module: Any) -> bool:
    """Whether the module's kernel is one that torch.compile cannot be trusted with."""
    if type(module).__module__.startswith("gptqmodel"):
        return hasattr(module, "out_features") and hasattr(module, "qweight")
    # Our own form of LLM.int8 launches a Triton kernel on device-side lists; products side by side have streams.
    return getattr(module.__dict__.get("forward"), "comparator_opaque", False)


@contextlib.contextmanager
def opaque_kernels(model: Any) -> Iterator[None]:
    """Inside, each such module's forward is one opaque operation."""
    wrapped = [m for m in model.modules() if is_opaque(m)]
    operation = _operation() if wrapped else None
    with contextlib.ExitStack() as stack:
        for module in wrapped:
            number = next(_numbers)
            _originals[number] = module.forward
            stack.callback(_originals.pop, number, None)

            def forward(x, number=number, size=module.out_features, **_):
                return operation(x, number, size)

            forward.comparator_opaque = True
            stack.enter_context(instead(module, forward))
        yield


@cache
def _operation() -> Any:
    import torch

    # The schema is written out: annotations would have to name torch at module scope.
    linear = torch.library.custom_op(
        "comparator::opaque_linear",
        lambda x, number, size: _originals[number](x),
        mutates_args=(),
        schema="(Tensor x, int number, int size) -> Tensor",
    )
    linear.register_fake(lambda x, number, size: x.new_empty((*x.shape[:-1], size)))
    return linear
