"""Another forward for a module, for a while: what fusing, side-by-side products and opaque kernels all do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def instead(module: Any, forward: Callable) -> Iterator[None]:
    """Inside, `module.forward` is `forward`; afterwards it is the class's own, or what stood there before."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
