"""Which variants are resident on the device: load, keep, evict, unload. Every method runs on the engine's one thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from comparator.backends import backend_for, unquantized_experts
from comparator.backends.base import Placement
from comparator.core.errors import Stopped, UserError
from comparator.core.settings import Settings
from comparator.core.state import Resident
from comparator.core.variant import Variant
from comparator.engine import placement as engine_placement
from comparator.engine.placement import pick_device
from comparator.metrics import memory
from comparator.metrics.memory import RESERVE_BYTES
from comparator.runtimes import ResidentModel, Runtime, runtime_for
from comparator.sources import Checkpoint
from comparator.util import formatting

if TYPE_CHECKING:
    from comparator.adapters import Plan


class Pool:
    """The resident variants, least recently used first. `on_change` is told after every load and unload."""

    def __init__(self, settings: Settings, on_change: Callable[[], None] = lambda: None):
        self.settings, self.on_change = settings, on_change
        self.slots: dict[str, ResidentModel] = {}

    # ------------------------------------------------------------ asking

    def get(self, handle: str) -> ResidentModel:
        if handle not in self.slots:
            raise UserError("This variant is no longer loaded.", "Run again to reload it.")
        slot = self.slots[handle]
        slot.last_used = time.monotonic()
        slot.use()
        return slot

    def find(
        self, checkpoint: Checkpoint, variant: Variant, max_memory: dict | None, plan: Plan | None = None
    ) -> ResidentModel | None:
        key = _key(checkpoint, variant, max_memory, plan)
        return next((s for s in self.slots.values() if s.key == key), None)

    def shared_bytes(self, slot: ResidentModel) -> int:
        """Of its memory, the bytes that a variant loaded before it holds too. So the sum of what is held less what is
        shared is what is there."""
        earlier: set[tuple] = set()
        for other in self.slots.values():
            if other is slot:
                break
            earlier |= other.storages.keys()
        return sum(size for key, size in slot.storages.items() if key in earlier)

    @property
    def held_bytes(self) -> int:
        """What all of them hold, each storage once."""
        return sum(s.held_bytes - self.shared_bytes(s) for s in self.slots.values())

    def residents(self) -> list[tuple[Resident, ResidentModel]]:
        return [(slot.resident(self.shared_bytes(slot)), slot) for slot in self.slots.values()]

    # ------------------------------------------------------------ loading

    def load(
        self,
        checkpoint: Checkpoint,
        variant: Variant,
        max_memory: dict[int | str, int] | None,
        evict: bool,
        keep: set[str],
        progress: Callable[[float | None, str], None],
        cancel: threading.Event,
        plan: Plan | None = None,
    ) -> tuple[ResidentModel, bool]:
        """(slot, whether it had to be loaded). `keep`: handles that this comparison still needs; they are evicted
        last. An adapter whose `plan` wants a base of its own gets one. Raises `UserError` when it cannot fit or cannot be loaded, `Stopped` at Stop; then nothing is left."""
        plan = plan if plan is not None and plan.private else None
        slot = self.find(checkpoint, variant, max_memory, plan)
        if slot is not None and not slot.is_current():
            self.unload(slot.handle)
            slot = None
        if slot is not None:
            slot.last_used = time.monotonic()
            self._note_shared(slot)
            return slot, False
        backend, runtime = backend_for(variant), runtime_for(variant)
        if reason := backend.unavailable(variant):
            raise UserError(
                f"{variant.method} cannot be used here: {reason}.", "Install it, or remove this variant."
            )
        device = engine_placement.first_device(max_memory) if max_memory else pick_device()
        needed = backend.needed_bytes(variant, checkpoint, device)
        placement = self._placement(needed, max_memory, variant, runtime)
        try:
            self._make_room(variant, needed, placement, evict, keep)
        except UserError as problem:
            why = unquantized_experts(variant, checkpoint)
            raise UserError(f"{problem.problem} {why}".strip(), problem.advice) from None
        if placement.max_memory and not max_memory:
            placement = replace(
                placement, max_memory=engine_placement.within_free(placement.max_memory, RESERVE_BYTES)
            )

        def on_progress(fraction: float | None, message: str) -> None:
            if cancel.is_set():
                raise Stopped
            progress(fraction, message)

        try:
            slot = runtime.load(checkpoint, variant, placement, on_progress, tuple(self.slots.values()), plan)
            slot.key = _key(checkpoint, variant, max_memory, plan)
        except BaseException:
            memory.give_back()
            raise
        self.slots[slot.handle] = slot
        self._note_shared(slot)
        self.on_change()
        return slot, True

    def _note_shared(self, slot: ResidentModel) -> None:
        if slot.storages:  # else it tells nothing of what it holds
            slot.memory = replace(slot.memory, shared_bytes=self.shared_bytes(slot))

    def _placement(
        self, needed: int, max_memory: dict | None, variant: Variant, runtime: Runtime
    ) -> Placement:
        """The limits that were asked for; else the GPU with the most room, or several where no single one can hold it."""
        budget = self.settings.budget_bytes
        if max_memory:
            runtime.require("max_memory", variant)
        elif max_memory is None and "max_memory" not in runtime.absent and not (budget and budget < needed):
            max_memory = engine_placement.automatic(needed, RESERVE_BYTES)
        return Placement(
            engine_placement.first_device(max_memory) if max_memory else pick_device(), max_memory
        )

    def _make_room(
        self, variant: Variant, needed: int, placement: Placement, evict: bool, keep: set[str]
    ) -> None:
        """Refuse what cannot fit, with both figures; or unload what was least recently used."""
        if not needed:
            return  # it is held elsewhere
        if placement.max_memory:
            possible = needed <= sum(placement.max_memory.values())
            while (
                possible and evict and self.slots and not engine_placement.fits(placement.max_memory, needed)
            ):
                self.unload(min(self.slots.values(), key=lambda s: (s.handle in keep, s.last_used)).handle)
            engine_placement.check(placement.max_memory, needed, variant.notation)
            return
        total, _ = memory.device_total_and_free(placement.device)
        limit = min(total, self.settings.budget_bytes or total)
        if needed + RESERVE_BYTES > limit:
            raise UserError(
                f"{variant.notation} needs about {_gb(needed)} and {_gb(limit)} is all there is "
                f"({'COMPARATOR_MEMORY_BUDGET' if limit < total else placement.device}).",
                "Choose a smaller variant or model"
                + (", or raise the budget." if limit < total else ", or spread it with max_memory."),
            )
        while (free := self._free(placement)) < needed + RESERVE_BYTES:
            candidates = sorted(self.slots.values(), key=lambda s: (s.handle in keep, s.last_used))
            if not evict or not candidates:
                held = ", ".join(
                    f"{s.variant.notation} ({_gb(s.memory.resident_bytes or 0)})" for s in candidates
                )
                raise UserError(
                    f"{variant.notation} needs about {_gb(needed)}, and {_gb(max(0, free))} is free.",
                    f"Unload {held}." if held else "Close other programs that use this device's memory.",
                )
            self.unload(candidates[0].handle)

    def _free(self, placement: Placement) -> int:
        _, free = memory.device_total_and_free(placement.device)
        if budget := self.settings.budget_bytes:
            free = min(free, budget - self.held_bytes)
        return free

    # ------------------------------------------------------------ letting go

    def unload(self, handle: str | None = None) -> int:
        """Unload one variant, or all. Returns the bytes freed, as measured: in CUDA's allocator, or on the
        CPU from the process."""
        gone = [handle] if handle else list(self.slots)
        devices = {self.slots[h].device for h in gone if h in self.slots} or {pick_device()}
        memory.give_back()  # what was free already must not count as this unloading's
        before = sum(memory.used(d) for d in devices)
        for name in gone:
            if name in self.slots:
                self.slots.pop(name).unload()
        self.on_change()  # before measuring: whoever keeps a picture of the pool keeps its models alive
        memory.give_back()
        after = sum(memory.used(d) for d in devices)
        return max(0, before - after)

    def free_for(self, needed_bytes: int, device: str) -> int:
        """Unload the least recently used variants until `needed_bytes` are free on the device or none is left. Returns the
        bytes free."""
        placement = Placement(device)
        while self._free(placement) < needed_bytes and self.slots:
            self.unload(min(self.slots.values(), key=lambda s: s.last_used).handle)
        return self._free(placement)

    def unload_altered(self, slot: ResidentModel) -> str:
        """Unload a variant whose weights are no longer the model's, and every other that shares some with it, so
        that no column runs on them. Returns who that was, with the verb."""
        sharing = [s for s in self.slots.values() if s.storages.keys() & slot.storages.keys()]
        gone = [slot, *(s for s in sharing if s is not slot)]
        names = [s.variant.notation for s in gone]
        for other in gone:
            self.unload(other.handle)
        return f"{formatting.join(names)} {'were' if len(names) > 1 else 'was'}"


def _key(
    checkpoint: Checkpoint, variant: Variant, max_memory: dict | None, plan: Plan | None = None
) -> tuple:
    apart = plan.pool_key if plan is not None else ""
    return (checkpoint.identity, variant.notation, str(max_memory or ""), apart)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
