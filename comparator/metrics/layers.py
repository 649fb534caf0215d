"""A loaded model → one row per stored tensor: its storage, its bytes, and the logical tensor that it represents, which
the backend defines.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from comparator.backends import quantized_type
from comparator.backends.base import Backend
from comparator.backends.dtypes import short_name
from comparator.core.result import LayerRow, LoadedLayer, StateTensor
from comparator.metrics.memory import nbytes, storage_key
from comparator.util import formatting
from comparator.util.compat.accelerate import real
from comparator.util.compat.torch import persistent_buffers

MOSTLY = 0.5  # a model of which less is quantized is not what the name of its method says
NOTABLE = 0.01


def stored_tensors(model: Any, backend: Backend) -> Iterator[tuple[str, Any, str, Any, Any, dict[str, Any]]]:
    """(name, module, name in the module, tensor, tensor with the stored values, quant state by name) of every parameter
    and persistent buffer.

    Buffers with quant state (GPTQ's scales) belong to their weight and are not listed by themselves.
    """
    for prefix, module in model.named_modules(remove_duplicate=True):
        state = {n: real(module, n, t) for n, t in backend.quant_state(module).items()}
        hidden = {storage_key(t) for t in state.values()}
        own = [*module.named_parameters(recurse=False, remove_duplicate=False), *persistent_buffers(module)]
        for name, tensor in own:
            tensor = real(module, name, tensor)
            values = backend.stored_values(module, tensor)
            if storage_key(values) in hidden:
                continue
            parts = state if name == backend.weight_name else {}
            yield (f"{prefix}.{name}" if prefix else name), module, name, tensor, values, parts


def rows(model: Any, backend: Backend) -> list[LayerRow]:
    """A row per stored tensor in its current state. Bytes are counted once per storage: a tied row has 0 bytes."""
    owners: dict[tuple, str] = {}
    table: list[LayerRow] = []
    for name, module, own_name, tensor, values, state in stored_tensors(model, backend):
        key = storage_key(values)
        parameters = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        twin = owners.get(key)
        owners.setdefault(key, name)
        meaning = backend.logical(module, tensor)
        shape = meaning.shape if meaning else tuple(tensor.shape)
        count = math.prod(shape)
        parts, state_bytes = [], 0
        for part, value in state.items():
            fresh = storage_key(value) not in owners
            owners.setdefault(storage_key(value), f"{name} ({part})")
            state_bytes += nbytes(value) if fresh else 0
            parts.append(StateTensor(part, short_name(value.dtype), tuple(value.shape), nbytes(value)))
        size = 0 if twin else nbytes(values)
        dtype = short_name(values.dtype)
        table.append(
            LayerRow(
                name=name,
                module_class=_class(module, backend),
                param_class=type(tensor).__name__ if own_name in parameters else "buffer",
                storage_dtype=dtype,
                logical_dtype=meaning.dtype if meaning else dtype,
                compute_dtype=meaning.compute_dtype if meaning else dtype,
                shape=shape,
                storage_shape=tuple(values.shape),
                parameters=0 if twin else count,
                bytes=size,
                quant_state_bytes=0 if twin else state_bytes,
                bits_per_weight=None if twin or not count else 8 * (size + state_bytes) / count,
                device=str(values.device),
                tied_to=twin,
                state=tuple(parts),
            )
        )
    return table


def _class(module: Any, backend: Backend) -> str:
    """The class's name, preceded by the library's for a backend's module."""
    library = (backend.library_of(module) or "").rpartition(".")[2]
    return f"{library} {type(module).__name__}".strip()


def with_loaded(now: list[LayerRow], loaded: list[LayerRow]) -> list[LayerRow]:
    """Rows `now`, with the storage right after loading where the first use has changed it."""
    before = {row.name: row for row in loaded}
    marked = []
    for row in now:
        old = before.get(row.name)
        changed = old and (
            (old.storage_dtype, old.storage_shape, old.bytes, old.quant_state_bytes)
            != (row.storage_dtype, row.storage_shape, row.bytes, row.quant_state_bytes)
        )
        if changed:
            loaded_layer = LoadedLayer(old.storage_dtype, old.storage_shape, old.bytes, old.quant_state_bytes)
            row = replace(row, loaded=loaded_layer)
        marked.append(row)
    return marked


def totals(table: list[LayerRow]) -> tuple[int, int]:
    """(weight bytes, quant state bytes) of the rows."""
    return sum(r.bytes for r in table), sum(r.quant_state_bytes for r in table)


def quantized_share(table: Iterable[LayerRow]) -> float:
    """The share of the parameters that are stored quantized, 0 to 1."""
    listed = list(table)
    total = sum(r.parameters for r in listed)
    return sum(r.parameters for r in listed if _is_quantized(r)) / total if total else 0.0


def _is_quantized(row: LayerRow) -> bool:
    return row.logical_dtype != row.storage_dtype or quantized_type(row.logical_dtype) is not None


def unquantized_note(table: list[LayerRow]) -> str | None:
    """What a quantized model keeps unquantized, where that is more than embeddings and a head: parameters that are no
    linear layers (fused experts), or most of the weights. None otherwise."""
    total, share = sum(r.parameters for r in table), quantized_share(table)
    if not share:
        return None
    plain = sorted((r for r in table if not _is_quantized(r)), key=lambda r: -r.parameters)
    other = [
        r
        for r in plain
        if len(r.shape) > 1 and r.module_class != "Linear" and "Embedding" not in r.module_class
    ]
    part = sum(r.parameters for r in other) / total
    text = []
    if part >= NOTABLE:
        text.append(
            f"{formatting.percent(part)} of the weights are no linear layers and stay {other[0].storage_dtype}: "
            f"{other[0].name} and {len(other) - 1} more."
        )
    if share < MOSTLY:
        largest = [f"{r.name} ({formatting.percent(r.parameters / total)})" for r in plain[:3]]
        text.append(
            f"Only {formatting.percent(share)} of the weights are quantized; the largest others are "
            f"{formatting.join(largest)}."
        )
    return " ".join(text) or None


def repack_note(now: list[LayerRow]) -> str | None:
    """A note on the layers that the library repacked at first use; None if there are none."""
    changed = [r for r in now if r.loaded]
    if not changed:
        return None
    row = changed[0]
    old_state = sum(r.loaded.quant_state_bytes for r in changed)
    new_state = sum(r.quant_state_bytes for r in changed)
    state = {p.name: p for p in row.state}.get("absmax")
    scales = f" with {state.dtype} absmax" if state else ""
    effect = (
        f" Their quant state went from {old_state / 1e6:.1f} to {new_state / 1e6:.1f} MB."
        if old_state != new_state
        else ""
    )
    return (
        f"Repacked at first use: the library rearranged {len(changed)} layers for this CPU, e.g. {row.name} from "
        f"{row.loaded.storage_shape} to {row.storage_shape} {row.storage_dtype}{scales}.{effect} “As loaded” figures "
        "are from before, all others from after."
    )
