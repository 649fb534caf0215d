"""Two loaded models → how far each weight of one is from the other's. Knows nothing of columns or events.

Quantized weights are unpacked by the backend that packed them; everything else is compared as it is stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from comparator.backends.base import Backend
from comparator.metrics.fidelity import weight_error
from comparator.types import Stopped


def all_errors(
    model: Any,
    backend: Backend,
    reference: Any,
    reference_backend: Backend,
    cancel: threading.Event,
    told: Callable[[float], None] = lambda share: None,
) -> dict[str, dict[str, float | None]]:
    """{tensor's name as in the Layers table: relative, sqnr_db, cosine, max_abs}.

    Tensors that the reference has not, or has in another shape, are left out. Raises `Stopped`.
    """
    import torch

    originals = {plain(name): module for name, module in reference.named_modules()}
    modules = [(name, module) for name, module in model.named_modules() if any(True for _ in own(module))]
    found: dict[str, dict[str, float | None]] = {}
    done: dict[tuple[int, int], dict] = {}  # a tied weight is compared once
    with torch.inference_mode():
        for number, (name, module) in enumerate(modules):
            if cancel.is_set():
                raise Stopped
            other = originals.get(plain(name))
            if other is not None:
                found |= _errors(name, module, backend, other, reference_backend, done)
            told((number + 1) / len(modules))
    return found


def _errors(
    name: str,
    module: Any,
    backend: Backend,
    other: Any,
    other_backend: Backend,
    done: dict[tuple[int, int], dict],
) -> dict[str, dict]:
    found = {}
    for own_name, tensor in own(module):
        weight = original = None
        if own_name in ("weight", "qweight"):
            weight, original = backend.dequantize(module), other_backend.dequantize(other)
        if weight is None:
            weight = tensor
        if original is None:
            original = getattr(other, "weight" if own_name == "qweight" else own_name, None)
        if original is None or original.shape != weight.shape or not original.is_floating_point():
            continue
        if weight.is_floating_point():
            key = (id(tensor), id(other))
            if weight is tensor:
                key = (tensor.data_ptr(), original.data_ptr())
            if key not in done:
                done[key] = weight_error(weight, original)
            found[f"{name}.{own_name}" if name else own_name] = done[key]
    return found


def own(module: Any):
    """(name, tensor) of a module's own parameters, and the packed weight that some libraries keep as a buffer."""
    yield from ((n, p) for n, p in module._parameters.items() if p is not None)
    packed = module._buffers.get("qweight")
    if packed is not None:
        yield "qweight", packed


def plain(name: str) -> str:
    """A module's name without what an adapter's wrapping puts into it."""
    parts = name.removeprefix("base_model.model.").split(".")
    return ".".join(p for p in parts if p != "base_layer")
