"""Which linear layers a model has, and which of them get an adapter. From the checkpoint's header, and from the model."""

from __future__ import annotations

import re
from typing import Any

from comparator.sources import Checkpoint
from comparator.training.settings import ALL_LINEAR, TrainSettings
from comparator.training.types import Target
from comparator.types import Problem

_EMBEDDING = re.compile(r"embed|(^|\.)(wte|wpe)$")
_HEADS = ("lm_head", "embed_out", "output")


def in_checkpoint(checkpoint: Checkpoint) -> tuple[Target, ...]:
    """The kinds of linear layer by the names of the stored tensors, in their order. Heads and embeddings are left out."""
    found: dict[str, Target] = {}
    for tensor in checkpoint.tensors:
        module, _, own = tensor.name.rpartition(".")
        name = module.rpartition(".")[2]
        if own != "weight" or len(tensor.shape) != 2 or name in _HEADS or not _numbered(module):
            continue
        if _EMBEDDING.search(module) or "norm" in name:
            continue
        before = found.get(name)
        outputs, inputs = tensor.shape
        found[name] = Target(name, (before.count if before else 0) + 1, inputs, outputs)
    return tuple(found.values())


def _numbered(module: str) -> bool:
    return any(part.isdigit() for part in module.split("."))


def in_model(model: Any) -> dict[str, list[str]]:
    """The loaded model's linear layers: last name → full names. What peft can put an adapter on, the head left out."""
    head = model.get_output_embeddings()
    found: dict[str, list[str]] = {}
    for full, module in model.named_modules():
        if module is head or not _is_linear(module):
            continue
        found.setdefault(full.rpartition(".")[2], []).append(full)
    return found


def _is_linear(module: Any) -> bool:
    import torch

    if isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D":
        return True
    return type(module).__module__.startswith("gptqmodel.nn_modules") and hasattr(module, "in_features")


def chosen(given: TrainSettings, known: dict[str, Any] | tuple[str, ...], model: str) -> tuple[str, ...]:
    """The names to give to peft: all of `known`, or those asked for. Raises `Problem` with the nearest names."""
    names = list(known)
    if not names:
        raise Problem(
            f"{model} has no linear layer that an adapter could be put on.", "Choose another model."
        )
    wanted = [w.strip() for w in given.target_modules if w.strip()]
    if not wanted or ALL_LINEAR in wanted:
        return tuple(names)
    for wish in wanted:
        last = wish.rpartition(".")[2]
        if last in _HEADS:
            raise Problem(
                f"{wish} cannot be a target: the loss is computed from the head's own weights, so an adapter on it "
                "would never be trained.",
                f"Leave it out. {model} has {', '.join(names)}.",
            )
        if last not in names:
            raise Problem(
                f"{model} has no module “{wish[:80]}”.", f"{_nearest(last, names)}It has {', '.join(names)}."
            )
    return tuple(dict.fromkeys(wanted))


def _nearest(wish: str, names: list[str]) -> str:
    from rapidfuzz import process

    near = [name for name, score, _ in process.extract(wish, names, limit=2) if score >= 60]
    return f"Did you mean {' or '.join(near)}? " if near else ""
