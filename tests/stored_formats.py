"""Checkpoints in formats that store packed weights, written by hand, and what is asked of the backends that load them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from comparator.backends import backend_for, resolve
from comparator.comparison.runner import compare
from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings, Request
from comparator.core.variant import Cell, parse_adapter
from comparator.sources import open_checkpoint

PROMPT = "The capital of France is"
NEW = 4
Tensors = dict[str, Any]


def rewrite(
    source: Path,
    target: Path,
    pack: Callable[[str, Any], Tensors | None],
    quantization: dict[str, Any] | None = None,
) -> Path:
    """A copy of a checkpoint. pack: (tensor's name, tensor) → what is stored in its place, None for itself.
    quantization: entries of quantization_config to add or change."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    stored: Tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        made = pack(name, tensor)
        stored.update({name: tensor} if made is None else made)
    save_file({n: t.contiguous() for n, t in stored.items()}, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    if quantization is not None:
        config["quantization_config"] = {**config.get("quantization_config", {}), **quantization}
    (target / "config.json").write_text(json.dumps(config))
    return target


def is_linear(name: str) -> bool:
    """A linear layer of a block, by the name of its weight."""
    return name.endswith("_proj.weight")


def run(engine, model: Path, variants: Iterable[str], adapter: str | None = None):
    cells = tuple(Cell(resolve(v), parse_adapter(adapter) if adapter else None) for v in variants)
    request = Request(str(model), cells, PROMPT, chat=False, settings=GenerationSettings(max_new_tokens=NEW),
                      fidelity="none")  # fmt: skip
    return list(compare(request, engine=engine))[-1].comparison


def generated(model: Any, folder: Path) -> tuple[int, ...]:
    """Greedy tokens of plain transformers."""
    import torch
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)
    return tuple(out[0, ids.shape[1] :].tolist())


def refused(notation: str, model: Path) -> str:
    """What `complete` says, which loads nothing."""
    with pytest.raises(UserError) as caught:
        variant = resolve(notation)
        backend_for(variant).complete(variant, open_checkpoint(str(model)))
    assert caught.value.advice
    return str(caught.value)
