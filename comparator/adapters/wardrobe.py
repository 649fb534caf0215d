"""The adapters that one resident base has been fitted with: get one, keep the latest, drop the oldest.

Works on the pool's slots, on the engine's thread. Knows nothing of prompts or of what is done while one is worn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from comparator.adapters import attach
from comparator.adapters.plan import Plan
from comparator.types import Adapter, LayerRow, Memory

if TYPE_CHECKING:
    from comparator.pool import Slot

KEEP = 8  # adapters a base stays fitted with; the one used longest ago goes first


def fitted(slot: Slot, plan: Plan) -> tuple[attach.Fitted | None, bool]:
    """(the adapter fitted to this base, whether that had to be done now); (None, False) where it is merged in.

    Raises `Problem`, and `attach.AltersBase` when the base must not be used any more.
    """
    if plan.adapter.merged:
        return None, False
    name = _name(plan.adapter)
    known = slot.adapters.get(name)
    if known is not None and known.plan.key == plan.key:
        return known, False
    slot.adapters.pop(name, None)  # the files have changed since
    while len(slot.adapters) >= KEEP:
        slot.adapters.pop(min(slot.adapters, key=lambda n: slot.adapters[n].last_used))
    fresh = slot.adapters[name] = attach.fit(slot.model, slot.backend, plan)
    return fresh, True


def known(slot: Slot, adapter: Adapter) -> attach.Fitted | None:
    return slot.adapters.get(_name(adapter))


def switch_s(slot: Slot, adapter: Adapter | None) -> float | None:
    """Seconds that its last putting on took; None without one, and where it is merged."""
    fitted = known(slot, adapter) if adapter is not None and not adapter.merged else None
    return fitted.switch_s if fitted else None


def memory(slot: Slot, worn: attach.Fitted | None) -> Memory:
    """The base's figures and the adapter's; a merged adapter adds nothing."""
    extra = worn.bytes if worn else 0
    return replace(slot.memory, adapter_bytes=extra, resident_bytes=(slot.memory.resident_bytes or 0) + extra)


def rows(slot: Slot, worn: attach.Fitted | None) -> list[LayerRow]:
    return attach.mark_rows(slot.rows, worn.marks) if worn else slot.rows


def kernel(slot: Slot, plan: Plan) -> str:
    if plan.adapter.merged:
        return slot.loaded.kernel
    return f"{slot.loaded.kernel} + {plan.facts.kind}"


def held_bytes(worn: Iterable[attach.Fitted]) -> int:
    return sum(f.bytes for f in worn)


def merge_note(plan: Plan, loaded: Any) -> str:
    name = plan.adapter.notation.removesuffix(":merged")
    if getattr(loaded.model, "is_quantized", False):
        return (
            f"{name} is merged: each of its layers was unpacked, changed and quantized again, which rounds the base and "
            "the adapter together. Unmerged, the adapter stays exact beside the quantized base."
        )
    return f"{name} is merged into the weights: nothing is added while it runs, and this column has its own base."


def _name(adapter: Adapter) -> tuple[str, str | None]:
    return adapter.source.strip(), adapter.revision
