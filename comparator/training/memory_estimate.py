"""Estimates the steps, trainable parameters and memory of a training run before anything is loaded.

Activations are those that a transformer block stores for the backward pass, for the longest sample of the data.
"""

from __future__ import annotations

import contextlib
import math

from comparator.backends import backend_for, methods
from comparator.backends.base import Method, Training
from comparator.core.errors import UserError
from comparator.core.result import ErrorInfo
from comparator.core.variant import Variant
from comparator.metrics.memory import RESERVE_BYTES
from comparator.sources import Checkpoint
from comparator.sources.dimensions import dimensions
from comparator.training import targets
from comparator.training.settings import TrainSettings
from comparator.training.types import Estimate

# Values an optimizer stores per trainable parameter, in the parameter's own dtype.
_STATES = {
    "adamw_torch": 2.0,
    "adamw_torch_fused": 2.0,
    "paged_adamw_32bit": 2.0,
    "adafactor": 0.1,
    "sgd": 0.0,
}
_EIGHT_BIT = ("paged_adamw_8bit", "adamw_bnb_8bit")
_LOGIT_ROWS = 1024  # trl's fused head computes the logits in chunks of positions


def optimizer_for(settings: TrainSettings, variant: Variant, device: str) -> str:
    """The optimizer's name with `auto` resolved. The 8-bit and paged ones need CUDA."""
    if settings.optimizer != "auto":
        return settings.optimizer
    quantized = backend_for(variant).training(variant, device).quantized
    return "paged_adamw_8bit" if quantized and device.startswith("cuda") else "adamw_torch"


def checkpointing_for(settings: TrainSettings, device: str) -> bool:
    if settings.gradient_checkpointing is not None:
        return settings.gradient_checkpointing
    return device.startswith("cuda")


def steps_for(settings: TrainSettings, rows: int) -> int:
    """Optimizer steps of a run over `rows` samples, as transformers counts them."""
    if settings.max_steps:
        return settings.max_steps
    batches = math.ceil(rows / settings.batch_size)
    return max(1, math.ceil(settings.epochs * max(1, math.ceil(batches / settings.accumulation))))


def estimate(
    checkpoint: Checkpoint,
    variant: Variant,
    settings: TrainSettings,
    *,
    rows: int,
    longest: int,
    device: str,
    free_bytes: int,
) -> Estimate:
    """Estimate a run over `rows` samples. `longest`: tokens of the longest one; `free_bytes`: memory free on the device
    after unloading other models. Raises `UserError` where the variant cannot be trained on, or a target is unknown."""
    backend = backend_for(variant)
    training = backend.training(variant, device)
    targets_by_name = {t.name: t for t in targets.in_checkpoint(checkpoint)}
    names = targets.select(settings, tuple(targets_by_name), checkpoint.source)
    layers = [targets_by_name[n.rpartition(".")[2]] for n in names]
    trainable = sum(t.count * settings.rank * (t.inputs + t.outputs) for t in layers)
    if settings.dora:
        trainable += sum(t.count * t.outputs for t in layers)
    optimizer, checkpointing = optimizer_for(settings, variant, device), checkpointing_for(settings, device)
    width = training.adapter_width
    states = trainable * (2.0 if optimizer in _EIGHT_BIT else width * _STATES.get(optimizer, 2.0))
    weights = backend.training_bytes(variant, checkpoint)
    activations = _activation_bytes(
        checkpoint, training, settings, min(longest, settings.max_length), checkpointing, device, layers
    )
    unpacked = training.unpacked_width * sum(t.count * t.inputs * t.outputs for t in targets_by_name.values())
    activations += (
        unpacked / max((t.count for t in targets_by_name.values()), default=1) if checkpointing else unpacked
    )
    adapter = 2 * width * trainable
    total = int(weights + adapter + states + activations)
    problem = None
    if total + RESERVE_BYTES > free_bytes:
        problem = ErrorInfo(
            f"Training on {variant.notation} needs about {_gb(total + RESERVE_BYTES)}, and {_gb(free_bytes)} is "
            f"available on {device}.",
            _smaller(variant, settings, checkpointing),
        )
    return Estimate(
        steps=steps_for(settings, rows),
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
        gradient_checkpointing=checkpointing,
        targets=names,
        problem=problem,
    )  # fmt: skip


def _activation_bytes(
    checkpoint: Checkpoint,
    training: Training,
    settings: TrainSettings,
    length: int,
    checkpointing: bool,
    device: str,
    linears: list,
) -> float:
    size = dimensions(checkpoint)
    hidden, inner, layers, vocabulary = size.hidden, size.inner, size.layers, size.vocabulary
    tokens = settings.batch_size * length
    width = training.activation_width
    # A block stores its norms' inputs and outputs (in fp32, twice), q, k, v, attention's output and three of the MLP.
    block = tokens * (4 * hidden * 4 + (6 * hidden + 4 * inner) * width)
    # Each adapter stores its input in its own dtype and the output of A.
    block += tokens * sum(t.inputs * 2 + settings.rank * 4 for t in linears)
    if settings.dropout:
        block += tokens * sum(t.inputs * 2 for t in linears)
    stored = layers * tokens * hidden * 4 + 2 * block if checkpointing else layers * block
    logits = 3 * min(_LOGIT_ROWS, tokens) * vocabulary * 4
    head = (
        vocabulary * hidden * (2 if device.startswith("cuda") and training.upcast else 0)
    )  # cast for autocast
    unpacked = 2 * max((t.inputs * t.outputs for t in linears), default=0) * width if training.upcast else 0
    return stored + logits + head + unpacked


def _smaller(variant: Variant, settings: TrainSettings, checkpointing: bool) -> str:
    ways = []
    if smallest := _smaller_base(variant):
        ways.append(f"train on {smallest}")
    if not checkpointing:
        ways.append("turn on gradient checkpointing")
    if settings.batch_size > 1:
        ways.append(f"lower the batch size ({settings.batch_size}) and raise the accumulation")
    ways.append(f"lower the maximum length ({settings.max_length:,})")
    return f"{'; '.join(ways)}.".capitalize()


def _smaller_base(variant: Variant) -> str | None:
    """Notation of the smallest method that quantizes at load and can be trained on; None where `variant` uses one."""
    smallest: list[Method] = []
    for backend, method in methods().values():
        with contextlib.suppress(UserError):
            backend.training(Variant(method.name), "cpu")
            # A method whose library is an extra is not what to turn to when memory is short.
            at_load = not (method.needs_source or backend.makes_checkpoints or backend.install)
            if at_load and (not smallest or method.bits <= smallest[0].bits):
                smallest = [*(m for m in smallest if m.bits == method.bits), method]
    if not smallest or variant.method in {m.name for m in smallest}:
        return None
    return (smallest[0].presets or (smallest[0].name,))[-1]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
