"""A checkpoint under the names that transformers looks for, as a folder of links: the weights are not copied."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from comparator.backends.ready_made import config_of
from comparator.sources import Checkpoint, weights
from comparator.util import atomic_dir

_CONFIGS = ("config.json", "quantize_config.json", "quantization_config.json", "quant_config.json")


def laid_out(
    checkpoint: Checkpoint,
    quantization: dict[str, Any],
    cache_dir: Path,
    method: str,
    added: dict[str, Any] | None = None,
) -> Path:
    """The folder, made now unless it is in the cache. `quantization`: what its config.json says as quantization_config;
    `added`: tensors that lie beside the checkpoint's own, by name."""
    source = checkpoint.path
    stored = weights.read_folder(source, checkpoint.source)
    files = sorted({s.file for s in stored})
    stamps = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    identity = repr(
        [str(source.resolve()), stamps, json.dumps(quantization, sort_keys=True), sorted(added or ())]
    )
    stem = re.sub(r"[^\w.-]+", "-", source.name)[:40]
    path = cache_dir / method / f"layout-{stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    with atomic_dir.building(path, what="the checkpoint's new layout") as tmp:
        if tmp is not None:
            _lay_out(source, stored, files, quantization, added or {}, tmp)
    return path


def _lay_out(
    source: Path,
    stored: list[weights.Stored],
    files: list[Path],
    quantization: dict[str, Any],
    added: dict[str, Any],
    target: Path,
) -> None:
    for file in source.iterdir():
        weight = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if file.is_file() and not weight and file.name not in _CONFIGS:
            _link(file, target / file.name)
    count = len(files) + bool(added)
    names = {file: f"model-{i:05}-of-{count:05}.safetensors" for i, file in enumerate(files, 1)}
    for file, name in names.items():
        _link(file, target / name)
    places = {s.info.name: names[s.file] for s in stored}
    if added:
        from safetensors.torch import save_file

        last = f"model-{count:05}-of-{count:05}.safetensors"
        save_file(added, target / last, {"format": "pt"})
        places |= dict.fromkeys(added, last)
    _write(target / weights.INDEX, {"metadata": {}, "weight_map": places})
    _write(target / "config.json", {**config_of(source), "quantization_config": quantization})


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2), encoding="utf-8")


def _link(file: Path, target: Path) -> None:
    try:
        os.symlink(file.resolve(), target)
    except OSError:  # Windows without the right to, or a file system without links
        shutil.copyfile(file, target)
