"""Turns layers that torch.compile must not trace into custom operations while a step is compiled.

Which ones is `Backend.opaque`: a kernel that writes into a buffer without declaring it, for one, is removed by the
compiler as a call without effect, but stays as an operation that returns a new tensor. Eager decoding and plain CUDA
graphs run the library's own module.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

from comparator.backends import owner
from comparator.decoding.patching import replace_forward

_originals: dict[int, Any] = {}
_numbers = itertools.count(1)


def is_opaque(module: Any) -> bool:
    """Whether torch.compile must not trace the module's forward: `Backend.opaque`, or a replaced forward that launches
    kernels on other streams or by pointers (`comparator_opaque`)."""
    backend = owner(module)
    if backend is not None and backend.opaque(module):
        return True
    return getattr(module.__dict__.get("forward"), "comparator_opaque", False)


@contextlib.contextmanager
def opaque_kernels(model: Any) -> Iterator[None]:
    """A context in which the forward of each such module is one custom operation."""
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
            stack.enter_context(replace_forward(module, forward))
        yield


@cache
def _operation() -> Any:
    import torch

    # The schema is explicit, since annotations would need torch at module scope.
    linear = torch.library.custom_op(
        "comparator::opaque_linear",
        lambda x, number, size: _originals[number](x),
        mutates_args=(),
        schema="(Tensor x, int number, int size) -> Tensor",
    )
    linear.register_fake(lambda x, number, size: x.new_empty((*x.shape[:-1], size)))
    return linear
