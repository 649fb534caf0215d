"""GPTQ's test material: the built-in model cut to two layers (real weights, seconds), and calibration for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest


def tiny(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    """A random model of two small layers."""
    import tiny_models

    tiny_models.save(folder, family, **sizes)
    return folder


def quantized(source: Path, target: Path, bits: int = 4, group_size: int = 64, **recipe: Any) -> Path:
    """`source` quantized with the shipped text, without any cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from comparator.backends import calibration
    from comparator.backends.gptq.layer import Recipe
    from comparator.backends.gptq.quantize import quantize

    tokenizer = AutoTokenizer.from_pretrained(source)
    samples = calibration.samples(tokenizer, calibration.texts("", Path("/nowhere")), 64)[:24]
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    target.mkdir(parents=True)
    quantize(
        model, samples, Recipe(bits, group_size, **recipe), target, tokenizer, lambda fraction, message: None
    )
    return target


def to_legacy(source: Path, target: Path) -> Path:
    """The same checkpoint in AutoGPTQ's older layout."""
    import json

    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    quantization = config.pop("quantization_config")
    (target / "config.json").write_text(json.dumps(config))
    kept = ("bits", "group_size", "desc_act", "sym", "damp_percent", "true_sequential")
    legacy = {k: quantization[k] for k in kept} | {"model_file_base_name": "gptq_model-4bit-64g"}
    (target / "quantize_config.json").write_text(json.dumps(legacy))
    (target / "model.safetensors").rename(target / "gptq_model-4bit-64g.safetensors")
    return target


def change_config(folder: Path, **changes: Any) -> None:
    import json

    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def settings_in(folder: Path):
    """Point the process's cache at `folder` for the length of a `with`; yields nothing."""
    import contextlib

    from comparator.core.settings import get_settings

    @contextlib.contextmanager
    def inside():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("COMPARATOR_CACHE_DIR", str(folder))
            get_settings.cache_clear()
            try:
                yield
            finally:
                patch.undo()
                get_settings.cache_clear()

    return inside()
