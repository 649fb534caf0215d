"""Temporarily replaces a module's forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def replace_forward(module: Any, forward: Callable) -> Iterator[None]:
    """A context in which `module.forward` is `forward`; the previous one is restored afterwards."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
