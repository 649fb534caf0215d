"""What training will take, before anything is loaded: steps, trainable parameters, bytes. Estimates, and called so.

Activations are counted for the longest sample of the data, as a transformer block keeps them for the way back.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

from comparator.backends import backend_for
from comparator.sources import Checkpoint
from comparator.training import targets
from comparator.training.settings import TrainSettings
from comparator.training.types import Estimate
from comparator.types import ErrorInfo, Variant

# Bytes an optimizer keeps for each trainable parameter, in the parameter's own dtype or in 8 bits.
_STATES = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "paged_adamw_32bit": 2.0,
    "adafactor": 0.1,
    "sgd": 0.0,
}
_EIGHT_BIT = ("paged_adamw_8bit", "adamw_bnb_8bit")
RESERVE_BYTES = 256 * 2**20  # workspaces, kept free
_LOGIT_ROWS = 1024  # trl's fused head goes over the positions in chunks


def optimizer_for(given: TrainSettings, variant: Variant, device: str) -> str:
    """`auto` resolved. The 8-bit and paged ones need CUDA."""
    if given.optimizer != "auto":
        return given.optimizer
    quantized = variant.method in ("int8", "nf4", "fp4", "gptq")
    return "paged_adamw_8bit" if quantized and device.startswith("cuda") else "adamw_torch"


def checkpointing_for(given: TrainSettings, device: str) -> bool:
    if given.gradient_checkpointing is not None:
        return given.gradient_checkpointing
    return device.startswith("cuda")


def steps_for(given: TrainSettings, rows: int) -> int:
    """Optimizer steps of a run over `rows` samples, as transformers counts them."""
    if given.max_steps:
        return given.max_steps
    batches = math.ceil(rows / given.batch_size)
    return max(1, math.ceil(given.epochs * max(1, math.ceil(batches / given.accumulation))))


def estimate(
    checkpoint: Checkpoint,
    variant: Variant,
    given: TrainSettings,
    *,
    rows: int,
    longest: int,
    device: str,
    free_bytes: int,
) -> Estimate:
    """`longest`: tokens of the longest sample; `free_bytes`: what the device has, or could have after unloading."""
    kinds = {t.name: t for t in targets.in_checkpoint(checkpoint)}
    names = targets.chosen(given, tuple(kinds), checkpoint.source)
    picked = [kinds[n.rpartition(".")[2]] for n in names]
    trainable = sum(t.count * given.rank * (t.inputs + t.outputs) for t in picked)
    if given.dora:
        trainable += sum(t.count * t.outputs for t in picked)
    optimizer, again = optimizer_for(given, variant, device), checkpointing_for(given, device)
    # trl keeps the adapter of an int8, nf4 or fp4 base in bf16, any other in fp32.
    width = 2 if variant.method in ("int8", "nf4", "fp4") else 4
    states = trainable * (2.0 if optimizer in _EIGHT_BIT else width * _STATES.get(optimizer, 2.0))
    weights = _weight_bytes(checkpoint, variant)
    activations = _activation_bytes(
        checkpoint, variant, given, min(longest, given.max_length), again, device, picked
    )
    adapter = 2 * width * trainable
    total = int(weights + adapter + states + activations)
    problem = None
    if total + RESERVE_BYTES > free_bytes:
        problem = ErrorInfo(
            f"Training on {variant.notation} needs about {_gb(total + RESERVE_BYTES)}, and {_gb(free_bytes)} can be had "
            f"on {device}.",
            _smaller(variant, given, again),
        )
    return Estimate(
        steps=steps_for(given, rows),
        trainable_parameters=trainable,
        total_parameters=checkpoint.parameters,
        weight_bytes=int(weights),
        adapter_bytes=int(adapter),
        optimizer_bytes=int(states),
        activation_bytes=int(activations),
        total_bytes=total,
        free_bytes=free_bytes,
        device=device,
        optimizer=optimizer,
        gradient_checkpointing=again,
        targets=names,
        problem=problem,
    )  # fmt: skip


def _weight_bytes(checkpoint: Checkpoint, variant: Variant) -> float:
    """With what peft changes before training a quantized base: the rest of it goes to fp32."""
    backend = backend_for(variant)
    if variant.method in ("int8", "nf4", "fp4"):
        others = tuple(o for o in variant.options if o[0] != "dtype")
        return backend.needed_bytes(replace(variant, options=(*others, ("dtype", "fp32"))), checkpoint)
    return backend.needed_bytes(variant, checkpoint)


def _activation_bytes(
    checkpoint: Checkpoint,
    variant: Variant,
    given: TrainSettings,
    length: int,
    again: bool,
    device: str,
    picked: list,
) -> float:
    config = _config(checkpoint)
    hidden = (
        config.get("hidden_size") or config.get("n_embd") or max((t.inputs for t in picked), default=1024)
    )
    inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
    layers = (
        config.get("num_hidden_layers") or config.get("n_layer") or max((t.count for t in picked), default=1)
    )
    vocabulary = checkpoint.vocab_size or config.get("vocab_size") or 32000
    tokens = given.batch_size * length
    quantized = variant.method in ("int8", "nf4", "fp4")
    width = 4 if variant.method == "fp32" or (quantized and not device.startswith("cuda")) else 2
    # A block keeps its norms' inputs and outputs (in fp32 twice), q, k, v, attention's output and the three of the MLP.
    block = tokens * (4 * hidden * 4 + (6 * hidden + 4 * inner) * width)
    # Each adapter keeps its input in its own dtype and what it makes.
    block += tokens * sum(t.inputs * 2 + given.rank * 4 for t in picked)
    if given.dropout:
        block += tokens * sum(t.inputs * 2 for t in picked)
    held = layers * tokens * hidden * 4 + 2 * block if again else layers * block
    logits = 3 * min(_LOGIT_ROWS, tokens) * vocabulary * 4
    head = vocabulary * hidden * (2 if device.startswith("cuda") and quantized else 0)  # cast for autocast
    unpacked = (
        2 * max((t.inputs * t.outputs for t in picked), default=0) * width if width and quantized else 0
    )
    return held + logits + head + unpacked


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        found = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found.get("text_config") or found


def _smaller(variant: Variant, given: TrainSettings, again: bool) -> str:
    ways = []
    if variant.method not in ("nf4", "fp4"):
        ways.append("train on nf4:dq")
    if not again:
        ways.append("switch gradient checkpointing on")
    if given.batch_size > 1:
        ways.append(f"lower the batch size ({given.batch_size}) and raise the accumulation")
    ways.append(f"lower the maximum length ({given.max_length:,})")
    return f"{'; '.join(ways)}.".capitalize()


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
