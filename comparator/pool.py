"""Which variants are resident on the device: load, keep, evict, unload. Knows nothing of prompts or pages.

Every method runs on the engine's one thread. A slot holds a model, its tokenizer and what loading it measured.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from comparator import layers, sharing, spread, words
from comparator.backends import backend_for
from comparator.backends.base import Backend, LoadedModel, Placement
from comparator.backends.loading import import_quietly
from comparator.metrics import memory
from comparator.settings import Settings
from comparator.sources import Checkpoint
from comparator.types import LayerRow, Memory, Problem, Resident, Stopped, Variant

if TYPE_CHECKING:
    from comparator.adapters import Plan
    from comparator.adapters.attach import Fitted
    from comparator.decode import Decoder

WARM_UP_TOKENS = (1, 2, 3, 4, 5, 6, 7, 8)
RESERVE_BYTES = 256 * 2**20  # activations and workspaces of one run, kept free


@dataclass
class Slot:
    """One resident variant."""

    handle: str
    model_name: str
    variant: Variant
    checkpoint: Checkpoint
    backend: Backend
    loaded: LoadedModel
    device: str
    load_s: float
    prepare_s: float
    memory: Memory
    rows: list[LayerRow]
    notes: list[str]
    last_used: float = field(default_factory=time.monotonic)
    warmed: set[int] = field(default_factory=set)
    adapters: dict[tuple, Fitted] = field(default_factory=dict)  # fitted to this base, ready to be put on
    storages: dict[tuple, int] = field(default_factory=dict)  # of the base, with their bytes
    key: tuple = ()  # what it was asked for as
    spread: bool = False  # over several devices, by accelerate
    private: Plan | None = None  # an adapter that wrote into these weights: no other column may use them
    _decoder: Decoder | None = None

    @property
    def model(self) -> Any:
        return self.loaded.model

    @property
    def held_bytes(self) -> int:
        """The base and every adapter it is fitted with."""
        worn = sum(a.bytes for a in self.adapters.values())
        return (self.memory.resident_bytes or 0) + worn + (self._decoder.bytes if self._decoder else 0)

    @property
    def decoder(self) -> Decoder:
        """How this model decodes, with the graphs that were recorded for it."""
        if self._decoder is None:
            from comparator.decode import Decoder

            self._decoder = Decoder(self.model, self.device)
        return self._decoder

    def resident(self, shared_bytes: int = 0) -> Resident:
        return Resident(
            self.handle,
            self.model_name,
            self.variant.notation + (f" + {self.private.adapter.notation}" if self.private else ""),
            self.held_bytes,
            self.device,
            shared_bytes,
            time.monotonic() - self.last_used,
        )


class Pool:
    """The resident variants, least recently used first. `on_change` is told after every load and unload."""

    def __init__(self, settings: Settings, on_change: Callable[[], None] = lambda: None):
        self.settings, self.on_change = settings, on_change
        self.slots: dict[str, Slot] = {}

    # ------------------------------------------------------------ asking

    def get(self, handle: str) -> Slot:
        if handle not in self.slots:
            raise Problem("This variant is no longer loaded.", "Run again: it loads once more.")
        slot = self.slots[handle]
        slot.last_used = time.monotonic()
        spread.work_on(slot.device)
        return slot

    def find(
        self, checkpoint: Checkpoint, variant: Variant, max_memory: dict | None, plan: Plan | None = None
    ) -> Slot | None:
        key = _key(checkpoint, variant, max_memory, plan)
        return next((s for s in self.slots.values() if s.key == key), None)

    def shared_bytes(self, slot: Slot) -> int:
        """Of what it holds, the bytes that a variant loaded before it holds too."""
        return sharing.shared_bytes(slot, self.slots.values())

    @property
    def held_bytes(self) -> int:
        """What all of them hold, each storage once."""
        return sum(s.held_bytes - self.shared_bytes(s) for s in self.slots.values())

    def residents(self) -> list[tuple[Resident, Slot]]:
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
    ) -> tuple[Slot, bool]:
        """(slot, whether it had to be loaded). `keep`: handles that this comparison still needs; they are evicted
        last. An adapter whose `plan` wants a base of its own gets one. Raises `Problem` when it cannot fit or cannot be loaded, `Stopped` at Stop; then nothing is left."""
        plan = plan if plan is not None and plan.private else None
        slot = self.find(checkpoint, variant, max_memory, plan)
        if slot is not None:
            slot.last_used = time.monotonic()
            slot.memory = replace(slot.memory, shared_bytes=self.shared_bytes(slot))
            return slot, False
        backend = backend_for(variant)
        if reason := backend.unavailable():
            raise Problem(
                f"{variant.method} cannot be used here: {reason}.", "Install it, or leave this column out."
            )
        needed = backend.needed_bytes(variant, checkpoint)
        placement = self._placement(needed, max_memory)
        self._make_room(variant, needed, placement, evict, keep)
        if placement.max_memory and not max_memory:
            placement = replace(placement, max_memory=spread.within_free(placement.max_memory, RESERVE_BYTES))

        def told(fraction: float | None, message: str) -> None:
            if cancel.is_set():
                raise Stopped
            progress(fraction, message)

        try:
            slot = self._load(checkpoint, variant, backend, placement, told, plan)
            slot.key = _key(checkpoint, variant, max_memory, plan)
        except BaseException:
            memory.give_back()
            raise
        self.slots[slot.handle] = slot
        slot.memory = replace(slot.memory, shared_bytes=self.shared_bytes(slot))
        self.on_change()
        return slot, True

    def _placement(self, needed: int, max_memory: dict | None) -> Placement:
        """The limits that were asked for; else the GPU with the most room, or several where no single one can hold it."""
        budget = self.settings.budget_bytes
        if max_memory is None and not (budget and budget < needed):
            max_memory = spread.automatic(needed, RESERVE_BYTES)
        return Placement(spread.first_device(max_memory) if max_memory else pick_device(), max_memory)

    def _load(self, checkpoint, variant, backend, placement: Placement, told, plan: Plan | None) -> Slot:
        from comparator.adapters import attach, wardrobe

        device, apart = placement.device, plan is not None or placement.max_memory is not None
        spread.work_on(device)
        told(0.0, f"importing {backend.name}")
        backend.silence()
        import_quietly(*backend.requires)  # neither load time nor load peak
        backend.prepare(checkpoint, variant, placement, told)
        if not apart:
            checkpoint = replace(checkpoint, lent=sharing.lent(checkpoint, self.slots.values(), device))
        told(0.0, "loading")
        start = time.perf_counter()
        with memory.track(device) as load_peak:
            loaded = backend.load(checkpoint, variant, placement, told)
            if plan is not None and plan.adapter.merged:  # before the first use repacks the weights
                told(None, f"merging {plan.facts.source}")
                loaded.model = attach.merge(loaded.model, backend, plan)
                loaded.notes.append(wardrobe.merge_note(plan, loaded))
        spread.check_placed(loaded.model, variant.notation)
        spread.follow(loaded.model)
        load_s = time.perf_counter() - start - loaded.extra.get("not_load_s", 0.0)
        if not apart and sharing.share(loaded.model, self.slots.values(), device):
            memory.give_back()
        footprint = int(loaded.model.get_memory_footprint())
        before = layers.rows(loaded.model, backend)

        told(None, "first use")
        start = time.perf_counter()
        warm_up(loaded.model, list(WARM_UP_TOKENS))
        prepare_s = time.perf_counter() - start
        now = layers.with_loaded(layers.rows(loaded.model, backend), before)
        loaded_weights, loaded_state = layers.totals(before)
        weights, state = layers.totals(now)
        held = sharing.storages(loaded.model)
        figures = Memory(
            loaded_weight_bytes=loaded_weights,
            loaded_quant_state_bytes=loaded_state,
            weight_bytes=weights,
            quant_state_bytes=state,
            adapter_bytes=None,
            resident_bytes=sum(held.values()),
            load_peak_bytes=load_peak.above_bytes,
            footprint_bytes=footprint,
            peak_source=load_peak.source,
        )
        checkpoint = replace(checkpoint, lent=None)
        notes = [*loaded.notes, *filter(None, [layers.repack_note(now), spread.note(held)])]
        return Slot(
            handle=secrets.token_hex(8),
            model_name=checkpoint.source,
            variant=variant,
            checkpoint=checkpoint,
            backend=backend,
            loaded=loaded,
            device=device,
            load_s=load_s,
            prepare_s=prepare_s,
            memory=figures,
            rows=now,
            notes=notes,
            storages=held,
            spread=placement.max_memory is not None,
            private=plan,
        )

    def _make_room(
        self, variant: Variant, needed: int, placement: Placement, evict: bool, keep: set[str]
    ) -> None:
        """Refuse what cannot fit, with both figures; or unload what was used longest ago."""
        if placement.max_memory:
            possible = needed <= sum(placement.max_memory.values())
            while possible and evict and self.slots and not spread.fits(placement.max_memory, needed):
                self.unload(min(self.slots.values(), key=lambda s: (s.handle in keep, s.last_used)).handle)
            spread.check(placement.max_memory, needed, variant.notation)
            return
        total, _ = memory.device_total_and_free(placement.device)
        limit = min(total, self.settings.budget_bytes or total)
        if needed + RESERVE_BYTES > limit:
            raise Problem(
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
                raise Problem(
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
        """Unload one variant, or all. Returns the bytes that really came back: to CUDA's allocator, or on the
        CPU from the process."""
        gone = [handle] if handle else list(self.slots)
        devices = {self.slots[h].device for h in gone if h in self.slots} or {pick_device()}
        memory.give_back()  # what was free already must not count as this unloading's
        before = sum(_used(d) for d in devices)
        for name in gone:
            self.slots.pop(name, None)
        self.on_change()  # before measuring: whoever keeps a picture of the pool keeps its models alive
        memory.give_back()
        after = sum(_used(d) for d in devices)
        return max(0, before - after)

    def unload_altered(self, slot: Slot) -> str:
        """Unload a variant whose weights are no longer the model's, and every other that shares some with it, so
        that no column runs on them. Returns who that was, with the verb."""
        gone = [slot, *sharing.sharing_with(slot, self.slots.values())]
        names = [s.variant.notation for s in gone]
        for other in gone:
            self.unload(other.handle)
        return f"{words.join(names)} {'were' if len(names) > 1 else 'was'}"


def _used(device: str) -> int:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.memory_allocated(device)
    return memory.resident_set()


def _key(
    checkpoint: Checkpoint, variant: Variant, max_memory: dict | None, plan: Plan | None = None
) -> tuple:
    apart = plan.pool_key if plan is not None else ""
    return (sharing.files(checkpoint), variant.notation, str(max_memory or ""), apart)


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def pick_device() -> str:
    """The GPU with the most room, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{max(range(torch.cuda.device_count()), key=lambda i: torch.cuda.mem_get_info(i)[0])}"


def warm_up(model: Any, token_ids: list[int], steps: int = 2) -> None:
    """One prefill and a few decode steps whose result is thrown away: libraries repack, compile and pick kernels
    at first use, and none of that belongs into a latency figure."""
    import torch

    from comparator.generate import Stepper, decoding

    vocabulary = model.get_input_embeddings().weight.shape[0]
    with torch.inference_mode(), decoding(model) as begin_decoding:
        stepper = Stepper(model, [t % vocabulary for t in token_ids], steps)
        for step in range(steps):
            token = int(stepper.next_logits().argmax(-1))
            if step == 0:
                begin_decoding()
            if step < steps - 1:
                stepper.push(token)
