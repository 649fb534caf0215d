"""A loaded model → one row per stored tensor: how it is kept, what it means, what it weighs.

Knows nothing of generation. A packed tensor's meaning comes from the backend that packed it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from comparator import spread
from comparator.backends.base import Backend
from comparator.backends.loading import short_name
from comparator.metrics.memory import nbytes, storage_key
from comparator.types import LayerRow, LoadedLayer, StateTensor


def stored_tensors(model: Any, backend: Backend) -> Iterator[tuple[str, Any, str, Any, dict[str, Any]]]:
    """(name, module, tensor's own name, tensor, its quant state) of every parameter and persistent buffer.

    Quant state that is kept in buffers (GPTQ's scales) belongs to its weight's row and gets none of its own.
    """
    for prefix, module in model.named_modules(remove_duplicate=True):
        state = {n: spread.real(module, n, t) for n, t in backend.quant_state(module).items()}
        hidden = {storage_key(t) for t in state.values()}
        carrier_found = False
        own = [(n, p) for n, p in module._parameters.items() if p is not None]
        own += [
            (n, b)
            for n, b in module._buffers.items()
            if b is not None and n not in module._non_persistent_buffers_set
        ]
        for name, tensor in own:
            tensor = spread.real(module, name, tensor)
            if storage_key(tensor) in hidden:
                continue
            carries = bool(state) and not carrier_found and name in ("weight", "qweight")
            carrier_found |= carries
            yield (f"{prefix}.{name}" if prefix else name), module, name, tensor, (state if carries else {})


def rows(model: Any, backend: Backend) -> list[LayerRow]:
    """Every stored tensor as it is now. Bytes are counted once per storage: a tied row has 0 and names its twin."""
    seen: dict[tuple, str] = {}
    found: list[LayerRow] = []
    for name, module, own_name, tensor, state in stored_tensors(model, backend):
        key = storage_key(tensor)
        twin = seen.get(key)
        seen.setdefault(key, name)
        meaning = backend.logical(module, tensor)
        shape = meaning.shape if meaning else tuple(tensor.shape)
        count = 1
        for size in shape:
            count *= size
        parts, state_bytes = [], 0
        for part, value in state.items():
            fresh = storage_key(value) not in seen
            seen.setdefault(storage_key(value), f"{name} ({part})")
            state_bytes += nbytes(value) if fresh else 0
            parts.append(StateTensor(part, short_name(value.dtype), tuple(value.shape), nbytes(value)))
        size = 0 if twin else nbytes(tensor)
        dtype = short_name(tensor.dtype)
        found.append(
            LayerRow(
                name=name,
                module_class=_class(module),
                param_class=type(tensor).__name__ if own_name in module._parameters else "buffer",
                storage_dtype=dtype,
                logical_dtype=meaning.dtype if meaning else dtype,
                compute_dtype=meaning.compute_dtype if meaning else dtype,
                shape=shape,
                storage_shape=tuple(tensor.shape),
                parameters=0 if twin else count,
                bytes=size,
                quant_state_bytes=0 if twin else state_bytes,
                bits_per_weight=None if twin or not count else 8 * (size + state_bytes) / count,
                device=str(tensor.device),
                tied_to=twin,
                state=tuple(parts),
            )
        )
    return found


def _class(module: Any) -> str:
    library = type(module).__module__.split(".")[0]
    return (
        f"{library} {type(module).__name__}"
        if library in ("bitsandbytes", "gptqmodel")
        else type(module).__name__
    )


def with_loaded(now: list[LayerRow], loaded: list[LayerRow]) -> list[LayerRow]:
    """Mark the rows whose storage the first use changed, with what was there right after loading."""
    before = {row.name: row for row in loaded}
    marked = []
    for row in now:
        old = before.get(row.name)
        changed = old and (
            (old.storage_dtype, old.storage_shape, old.bytes, old.quant_state_bytes)
            != (row.storage_dtype, row.storage_shape, row.bytes, row.quant_state_bytes)
        )
        if changed:
            was = LoadedLayer(old.storage_dtype, old.storage_shape, old.bytes, old.quant_state_bytes)
            row = replace(row, loaded=was)
        marked.append(row)
    return marked


def totals(found: list[LayerRow]) -> tuple[int, int]:
    """(weight bytes, quant state bytes) of the rows."""
    return sum(r.bytes for r in found), sum(r.quant_state_bytes for r in found)


def repack_note(now: list[LayerRow]) -> str | None:
    """In words, what the library changed at first use; None where it changed nothing."""
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
