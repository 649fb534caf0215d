"""Load a variant with its backend, as a torch model in this process, and measure what that took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from comparator.backends import backend_for
from comparator.backends.base import Placement, Progress
from comparator.backends.options import KV_CACHE
from comparator.core.result import Memory
from comparator.core.variant import Variant
from comparator.runtimes.base import ResidentModel, Runtime
from comparator.runtimes.transformers import devices, weight_sharing
from comparator.runtimes.transformers.resident import TransformersModel
from comparator.sources import Checkpoint
from comparator.sources.examine import examine

if TYPE_CHECKING:
    from comparator.adapters import Plan
    from comparator.backends.base import LoadedModel


class Transformers(Runtime):
    name = "transformers"
    absent = {}

    def load(
        self,
        checkpoint: Checkpoint,
        variant: Variant,
        placement: Placement,
        progress: Progress,
        residents: Sequence[ResidentModel] = (),
        plan: Plan | None = None,
    ) -> TransformersModel:
        from comparator.adapters import attach
        from comparator.backends.transformers_loader import import_quietly
        from comparator.decoding import kv_cache
        from comparator.decoding.warm_up import WARM_UP_TOKENS, warm_up
        from comparator.metrics import layers, memory

        backend, device = backend_for(variant), placement.device
        apart = plan is not None or placement.max_memory is not None
        others = [] if apart else [r for r in residents if isinstance(r, TransformersModel)]
        devices.work_on(device)
        progress(0.0, f"importing {backend.name}")
        backend.silence()
        import_quietly(*backend.requires)  # neither load time nor load peak
        backend.prepare(checkpoint, variant, placement, progress)
        lent = weight_sharing.lent(checkpoint, others, device)
        progress(0.0, "loading")
        start = time.perf_counter()
        with memory.unfragmented(device), memory.track(device) as load_peak:
            loaded = backend.load(replace(checkpoint, lent=lent), variant, placement, progress)
            if plan is not None and plan.adapter.merged:  # before the first use repacks the weights
                progress(None, f"merging {plan.facts.source}")
                loaded.model, found = attach.merge(loaded.model, backend, plan)
                loaded.notes += [_merge_note(plan, loaded), *found]
        lent = None
        devices.check_placed(loaded.model, variant.notation)
        devices.follow(loaded.model)
        load_s = time.perf_counter() - start - loaded.extra.get("not_load_s", 0.0)
        if weight_sharing.share(loaded.model, others, device):
            memory.give_back()
        footprint = int(loaded.model.get_memory_footprint())
        before = layers.rows(loaded.model, backend)
        if kind := backend.requested(variant).get(KV_CACHE.name):
            loaded.notes.append(kv_cache.quantize(loaded.model, kind))

        progress(None, "warming up")
        start = time.perf_counter()
        warm_up(loaded.model, list(WARM_UP_TOKENS))
        prepare_s = time.perf_counter() - start
        rows = layers.with_loaded(layers.rows(loaded.model, backend), before)
        loaded_weights, loaded_state = layers.totals(before)
        weights, state = layers.totals(rows)
        storages = weight_sharing.storages(loaded.model)
        head = getattr(loaded.model.get_output_embeddings(), "weight", None)
        return TransformersModel(
            runtime=self,
            backend=backend,
            loaded=loaded,
            checkpoint=checkpoint,
            variant=variant,
            device=device,
            kernel=loaded.kernel,
            vocabulary=loaded.model.config.get_text_config(decoder=True).vocab_size,
            logit_bytes=4 if head is None else max(2, head.element_size()),
            memory=Memory(
                loaded_weight_bytes=loaded_weights,
                loaded_quant_state_bytes=loaded_state,
                weight_bytes=weights,
                quant_state_bytes=state,
                adapter_bytes=None,
                resident_bytes=sum(storages.values()),
                load_peak_bytes=load_peak.above_bytes,
                footprint_bytes=footprint,
                peak_source=load_peak.source,
            ),
            load_s=load_s,
            prepare_s=prepare_s,
            rows=rows,
            notes=[
                *loaded.notes,
                *filter(
                    None, [layers.unquantized_note(rows), layers.repack_note(rows), devices.note(storages)]
                ),
                *filter(None, [examine(checkpoint).note]),
            ],
            storages=storages,
            spread=placement.max_memory is not None,
            private=plan,
        )


def _merge_note(plan: Plan, loaded: LoadedModel) -> str:
    name = plan.adapter.notation.removesuffix(":merged")
    if getattr(loaded.model, "is_quantized", False):
        return (
            f"{name} is merged: each of its layers was unpacked, changed and quantized again, which rounds the base and "
            "the adapter together. Unmerged, the adapter stays exact next to the quantized base."
        )
    return (
        f"{name} is merged into the weights: nothing is added at run time, and this variant has its own base."
    )
