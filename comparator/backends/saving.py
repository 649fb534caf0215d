"""Write a variant to a folder: what `Backend.save` is made of. Imports torch and transformers only when called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparator.backends.base import Backend, Placement, Progress
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint

Change = Callable[[Any], Any]
_FILES = ("config.json", "quantize_config.json", "*.safetensors", "*.safetensors.index.json")


def write_loaded(
    backend: Backend,
    checkpoint: Checkpoint,
    variant: Variant,
    placement: Placement,
    target: Path,
    progress: Progress,
    change: Change | None = None,
) -> None:
    """Load the variant again and let transformers write it. It is never run before, since libraries repack weights at their
    first use, and shares nothing with resident variants."""
    backend.prepare(checkpoint, variant, placement, progress)
    model = backend.load(replace(checkpoint, lent=None), variant, placement, progress).model
    if change is not None:
        model = change(model)
    progress(None, "writing the checkpoint")
    set_plain_generation(model)
    model.save_pretrained(target, max_shard_size="5GB")


def set_plain_generation(model: Any) -> None:
    """transformers refuses to write a generation config that it finds contradictory, as published ones are; the
    checkpoint's own file is copied instead."""
    from transformers import GenerationConfig

    if getattr(model, "generation_config", None) is not None:
        model.generation_config = GenerationConfig.from_model_config(model.config)


def copy_checkpoint(folder: Path, target: Path, progress: Progress) -> None:
    """Weights and configs of a checkpoint as they are."""
    files = [file for pattern in _FILES for file in sorted(folder.glob(pattern))]
    for number, file in enumerate(files):
        progress(number / len(files), f"copying {file.name}")
        shutil.copy(file, target)  # of a link (the Hub's cache has links) what it leads to
    _forget_paths(target / "config.json")


def _forget_paths(file: Path) -> None:
    """config.json of some libraries says where on their machine the model was."""
    config = json.loads(file.read_text(encoding="utf-8"))
    if config.pop("_name_or_path", None) is not None:
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def refuse_change(variant: Variant) -> UserError:
    """For a ready-made checkpoint that is copied as it is."""
    return UserError(
        f"No adapter can be merged into {variant.notation}, whose files are copied as they are.",
        "Merge it on bf16 and quantize the folder that this writes.",
    )
