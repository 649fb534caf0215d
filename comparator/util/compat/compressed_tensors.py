"""compressed-tensors' progress bars, for which it has no switch; written for compressed-tensors 0.20."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

WRITTEN_FOR = "0.20"


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """While open, it prints no progress bars as a model is loaded."""
    from compressed_tensors.compressors.model_compressors import model_compressor
    from compressed_tensors.quantization.lifecycle import apply

    own = {module: module.tqdm for module in (apply, model_compressor)}
    for module, bar in own.items():
        module.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        for module, bar in own.items():
            module.tqdm = bar
