"""Checkpoints that are quantized on this machine: taken from the cache, or made once, whole or not at all.

The cache's key holds the model's content, the recipe, the calibration text and the version of the library that rounds.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Protocol

import psutil

from comparator.backends import calibration
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.sources import Checkpoint
from comparator.sources.tokenizer import load_tokenizer
from comparator.util import atomic_dir

Progress = Callable[[float | None, str], None]

_TOKENIZE_CPU_S = 60  # a stranger's tokenizer, for the calibration text


class Recipe(Protocol):
    """What decides the quantized weights, beside the model and the calibration text. Its repr is in the cache's key."""

    method: ClassVar[str]
    library: ClassVar[str]  # whose version decides too, by its name for pip

    @property
    def bits(self) -> int: ...
    @property
    def group_size(self) -> int: ...  # -1: one group a row

    def make(
        self,
        checkpoint: Checkpoint,
        samples: list[list[int]],
        tokenizer: Any,
        device: str,
        target: Path,
        progress: Progress,
    ) -> None:
        """Write the quantized checkpoint to the folder `target`, calibrated with token ids, one list a sample. The model's
        blocks run on `device`, one at a time. `progress` is called all along and may raise to stop."""

    def bytes(self, checkpoint: Checkpoint) -> int:
        """About what the quantized model holds."""


class LoadedHere:
    """Base of a recipe that quantizes a model in this process, as gptqmodel's methods do."""

    method: ClassVar[str]
    library: ClassVar[str] = "gptqmodel"

    def quantize(
        self,
        model: Any,
        samples: list[list[int]],
        target: Path,
        tokenizer: Any,
        progress: Progress,
        device: str,
    ) -> None:
        """Quantize the model (on the CPU) in place, its blocks on `device` one at a time, and write it to `target`."""
        raise NotImplementedError

    def make(
        self,
        checkpoint: Checkpoint,
        samples: list[list[int]],
        tokenizer: Any,
        device: str,
        target: Path,
        progress: Progress,
    ) -> None:
        from comparator.backends.base import Placement
        from comparator.backends.transformers_loader import from_pretrained

        progress(0.0, "loading the full-precision model")
        # On the CPU whatever the device is: one block at a time goes there, so a model larger than the GPU works.
        model = from_pretrained(
            checkpoint,
            Placement("cpu"),
            lambda _, message: progress(0.0, message),
            dtype=dtype_for(checkpoint),
        )
        self.quantize(model, samples, target, tokenizer, progress, device)


_VERSION = 1  # raise it when the same recipe gives other weights


def folder(checkpoint: Checkpoint, recipe: Recipe, cal: str, cache_dir: Path) -> Path:
    """The cache folder of this recipe's checkpoint, which may not exist yet."""
    identity = [_VERSION, importlib.metadata.version(recipe.library), recipe, _calibration_key(cal, cache_dir), _content(checkpoint, cache_dir)]  # fmt: skip
    key = hashlib.sha256(repr(identity).encode()).hexdigest()[:12]
    stem = re.sub(r"[^\w.-]+", "-", checkpoint.source)[-50:].strip("-.")
    group = f"g{recipe.group_size}" if recipe.group_size > 0 else "row"
    return cache_dir / recipe.method / f"{stem}-{recipe.bits}bit-{group}-{key}"


def make(
    checkpoint: Checkpoint, recipe: Recipe, cal: str, cache_dir: Path, device: str, progress: Progress
) -> Path:
    """The folder of the quantized checkpoint, made now unless it is there. Raises `UserError`, and what `progress`
    raises; in both cases nothing is left behind."""
    path = folder(checkpoint, recipe, cal, cache_dir)
    with atomic_dir.building(
        path,
        progress=progress,
        need_bytes=sum(size.bytes for size in recipe.sizes(checkpoint)),
        what="the quantized checkpoint",
    ) as tmp:
        if tmp is not None:
            _make(checkpoint, recipe, cal, cache_dir, device, tmp, progress)
    return path


def _make(checkpoint, recipe: Recipe, cal: str, cache_dir: Path, device: str, target: Path, progress) -> None:
    from comparator.backends.gptqmodel_layers import quiet

    quiet.silence()
    documents = calibration.texts(cal, cache_dir, progress)
    tokenizer = load_tokenizer(checkpoint, _TOKENIZE_CPU_S)
    samples = calibration.samples(tokenizer, documents, checkpoint.context_length)
    _check_memory(checkpoint, recipe.method)
    recipe.make(checkpoint, samples, tokenizer, device, target, progress)


def dtype_for(checkpoint: Checkpoint) -> str:
    """The dtype in which the model is loaded before it is quantized."""
    return "bf16" if checkpoint.dtype == "bf16" else "fp32"


def _check_memory(checkpoint: Checkpoint, method: str) -> None:
    need = checkpoint.parameters * (2 if dtype_for(checkpoint) == "bf16" else 4)
    free = psutil.virtual_memory().available
    if need * 1.1 > free:
        raise UserError(
            f"Quantizing {checkpoint.source} takes about {need * 1.1 / 1e9:.1f} GB of main memory for the "
            f"full-precision model, and {free / 1e9:.1f} GB is free.",
            f"Unload other variants or close other programs, or name a ready-made checkpoint: {method}@user/repo.",
        )


def _calibration_key(cal: str, cache_dir: Path) -> str:
    """The calibration text in the key: a hash, or the name of a data set that does not change."""
    return cal or calibration.fingerprint(calibration.texts("", cache_dir))


def _content(checkpoint: Checkpoint, cache_dir: Path) -> Any:
    """Identifies the weights: a Hub commit, the cache's own folder name, or the files' sizes and dates."""
    if checkpoint.revision:
        return (checkpoint.source.partition("@")[0], checkpoint.revision)
    if checkpoint.path.parent == cache_dir / "models":  # named by the hash of the file it was converted from
        return checkpoint.path.name
    files = sorted(
        p for p in checkpoint.path.iterdir() if p.suffix == ".safetensors" or p.name == "config.json"
    )
    return (str(checkpoint.path.resolve()), [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files])


# ---------------------------------------------------------------- code to copy


def folder_name(variant: Variant) -> str:
    """The folder that the code of a column names."""
    return variant.notation.replace(":", "-").replace(",", "-").replace("=", "-")


def code_comment(variant: Variant, model: str, title: str) -> list[str]:
    """How that folder is made, as comment lines."""
    command = ["python", "-m", "comparator", "quantize", "--model", model, "--variant", variant.notation]
    command += ["--output", folder_name(variant)]
    return [
        f"# {title} rounds once and keeps the result. This writes the folder, at once where it was made before:",
        f"#   {ascii(shlex.join(command))[1:-1]}",
    ]
