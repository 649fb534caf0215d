"""The base of a training: a copy of its own, never one that columns run on, since peft changes what it trains on.

Runs on the engine's thread. Knows backends and peft's preparations; nothing of data or of jobs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from comparator.backends import backend_for, loading
from comparator.backends.base import Placement
from comparator.notation import sort_options
from comparator.types import Problem, Variant

Progress = Callable[[float | None, str], None]


@dataclass
class Base:
    """`variant` as it was loaded; `notes`: what differs from what was asked for."""

    model: Any
    variant: Variant
    notes: tuple[str, ...]
    quantized: bool


def device() -> str:
    """Where training happens: one GPU, or the CPU. On the engine's thread, or once torch is imported."""
    import torch

    return "cuda:0" if torch.cuda.is_available() else "cpu"


def make_room(pool: Any, place: str, needed_bytes: int) -> int:
    """Unload what was used longest ago until so much is free, or nothing is left. Returns what is free."""
    from comparator.metrics.memory import device_total_and_free

    def free() -> int:
        now = device_total_and_free(place)[1]
        budget = pool.settings.budget_bytes
        return min(now, budget - pool.held_bytes) if budget else now

    while free() < needed_bytes and pool.slots:
        pool.unload(min(pool.slots.values(), key=lambda s: s.last_used).handle)
    return free()


def trainable_variant(variant: Variant, device: str) -> tuple[Variant, tuple[str, ...]]:
    """The variant with a kernel that has a way back. Only GPTQ has kernels without one."""
    if variant.method != "gptq":
        return variant, ()
    options = dict(variant.options)
    wanted = options.get("kernel") or "auto"
    usable = ("triton", "torch") if device.startswith("cuda") else ("torch",)
    if wanted in usable:
        return variant, ()
    options["kernel"] = usable[0]
    notes = () if wanted == "auto" else (f"Trained with the kernel {usable[0]}: {wanted} has no gradients.",)
    return replace(variant, options=sort_options(options)), notes


def load(checkpoint: Any, variant: Variant, device: str, checkpointing: bool, progress: Progress) -> Base:
    """The prepared base. Raises `Problem`, and what `progress` raises."""
    backend = backend_for(variant)
    if reason := backend.unavailable():
        raise Problem(
            f"{variant.method} cannot be used here: {reason}.", "Install it, or train on another base."
        )
    asked = backend.complete(variant, checkpoint, progress)
    exact, notes = trainable_variant(asked, device)
    placement = Placement(device)
    backend.silence()
    progress(None, f"importing {backend.name}")
    loading.import_quietly(*backend.requires, "peft", "trl")
    try:
        backend.prepare(checkpoint, exact, placement, progress)
        progress(0.0, f"loading {exact.notation}")
        loaded = backend.load(checkpoint, exact, placement, progress)
    except Problem:
        if exact == asked or dict(exact.options).get("kernel") == "torch":
            raise
        exact = replace(asked, options=sort_options({**dict(asked.options), "kernel": "torch"}))
        notes = (*notes, "Trained with the kernel torch: triton cannot be used here.")
        backend.prepare(checkpoint, exact, placement, progress)
        loaded = backend.load(checkpoint, exact, placement, progress)
    model = loaded.model
    quantized = exact.method not in ("fp32", "bf16", "fp16")
    if quantized:
        from peft import prepare_model_for_kbit_training

        progress(None, "preparing the quantized base for training")
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
        )
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights for a CPU at the first answer, and there is no way back from that layout.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    model.config.use_cache = True
    return Base(model, asked, notes, quantized)
