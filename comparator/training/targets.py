"""Which linear layers a model has, and which of them get an adapter; from the checkpoint's header or the loaded model."""

from __future__ import annotations

import re
from typing import Any

from comparator.backends import owner
from comparator.core.errors import UserError
from comparator.sources import Checkpoint
from comparator.training.settings import ALL_LINEAR, TrainSettings
from comparator.training.types import Target

_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe)$")
_HEADS = ("lm_head", "embed_out", "output")


def in_checkpoint(checkpoint: Checkpoint) -> tuple[Target, ...]:
    """Linear layers by the last part of their names, in the order of the stored tensors; no heads and embeddings."""
    kinds: dict[str, Target] = {}
    for tensor in checkpoint.tensors:
        module, _, own = tensor.name.rpartition(".")
        name = module.rpartition(".")[2]
        if own != "weight" or len(tensor.shape) != 2 or name in _HEADS or not _numbered(module):
            continue
        if _EMBEDDING.search(module) or "norm" in name:
            continue
        before = kinds.get(name)
        outputs, inputs = tensor.shape
        kinds[name] = Target(name, (before.count if before else 0) + 1, inputs, outputs)
    return tuple(kinds.values())


def _numbered(module: str) -> bool:
    return any(part.isdigit() for part in module.split("."))


def in_model(model: Any) -> dict[str, list[str]]:
    """The loaded model's linear layers that peft can adapt, without the head: last part of the name → full names."""
    head = model.get_output_embeddings()
    linears: dict[str, list[str]] = {}
    for full, module in model.named_modules():
        if module is head or not _is_linear(module):
            continue
        linears.setdefault(full.rpartition(".")[2], []).append(full)
    return linears


def _is_linear(module: Any) -> bool:
    import torch

    if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    return hasattr(module, "in_features") and owner(module) is not None


def select(
    settings: TrainSettings, available: dict[str, Any] | tuple[str, ...], model: str
) -> tuple[str, ...]:
    """peft's `target_modules`: all of `available`, or the requested ones. Raises `UserError` with the nearest names."""
    names = list(available)
    if not names:
        raise UserError(
            f"{model} has no linear layer that an adapter could be attached to.", "Choose another model."
        )
    requested = [w.strip() for w in settings.target_modules if w.strip()]
    if not requested or ALL_LINEAR in requested:
        return tuple(names)
    for target in requested:
        last = target.rpartition(".")[2]
        if last in _HEADS:
            raise UserError(
                f"{target} cannot be a target: the loss is computed from the head's own weights, so an adapter on it "
                "would never be trained.",
                f"Leave it out. {model} has {', '.join(names)}.",
            )
        if last not in names:
            raise UserError(
                f"{model} has no module “{target[:80]}”.",
                f"{_nearest(last, names)}It has {', '.join(names)}.",
            )
    return tuple(dict.fromkeys(requested))


def _nearest(name: str, names: list[str]) -> str:
    from rapidfuzz import process

    near = [candidate for candidate, score, _ in process.extract(name, names, limit=2) if score >= 60]
    return f"Did you mean {' or '.join(near)}? " if near else ""
