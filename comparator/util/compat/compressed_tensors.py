"""compressed-tensors' progress bars, for which it has no switch; written for compressed-tensors 0.20."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

WRITTEN_FOR = "0.20"


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """While open, it prints no progress bars as a model is loaded."""
    from compressed_tensors.compressors.model_compressors import model_compressor
    from compressed_tensors.quantization.lifecycle import apply

    own = {module: module.tqdm for module in (apply, model_compressor)}
    for module, bar in own.items():
        module.tqdm = _quiet(bar)
    try:
        yield
    finally:
        for module, bar in own.items():
            module.tqdm = bar


def _quiet(bar: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **options: bar(*arguments, **{**options, "disable": True})
