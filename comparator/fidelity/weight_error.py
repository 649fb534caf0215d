"""The weights of two resident models → how far each of one is from the other's.

Quantized weights are unpacked by the backend that packed them; everything else is compared as it is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from comparator.core.errors import Stopped
from comparator.fidelity.divergence import weight_error
from comparator.runtimes import Weights


def all_errors(
    ours: Weights,
    reference: Weights,
    cancel: threading.Event,
    on_progress: Callable[[float], None] = lambda share: None,
) -> dict[str, dict[str, float | None]]:
    """{tensor's name as in the Layers table: relative, sqnr_db, cosine, max_abs}.

    Tensors that the reference has not, or has in another shape, are left out. Raises `Stopped`.
    """
    import torch

    errors: dict[str, dict[str, float | None]] = {}
    known: dict[tuple, dict] = {}  # a tied weight is compared once
    modules = ours.modules()
    with torch.inference_mode():
        for number, module in enumerate(modules):
            if cancel.is_set():
                raise Stopped
            for name, key, weight, original in _pairs(ours, reference, module):
                if key not in known:
                    known[key] = weight_error(weight, original)
                errors[f"{module}.{name}" if module else name] = known[key]
            on_progress((number + 1) / len(modules))
    return errors


def _pairs(ours: Weights, reference: Weights, module: str) -> Iterator[tuple[str, tuple, Any, Any]]:
    """(tensor's name, a key that tied weights have in common, the tensor, the reference's) of one module."""
    originals = reference.tensors(module)
    for name, tensor in ours.tensors(module).items():
        stored = originals.get("weight" if name == ours.weight_name else name)
        weight = original = None
        if name in ("weight", ours.weight_name):
            weight, original = ours.unpacked(module), reference.unpacked(module)
        weight = tensor if weight is None else weight
        original = stored if original is None else original
        if original is None or original.shape != weight.shape:
            continue
        if original.is_floating_point() and weight.is_floating_point():
            same = (id(tensor), id(stored)) if original is stored else (module, name)
            yield name, same, weight, original
