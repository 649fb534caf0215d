"""AWQ checkpoints made by hand: rounded to the nearest level and packed with numpy, independent of gptqmodel and of us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output of eight lies in each half byte of a word, from the lowest


def words(values: np.ndarray, bits: int) -> np.ndarray:
    """(rows, outputs) codes → (rows, outputs × bits ÷ 32) int32, bit by bit; 4-bit codes in AutoAWQ's order."""
    if bits == 4:
        values = values.reshape(len(values), -1, 8)[:, :, ORDER].reshape(values.shape)
    single = (values[:, :, None] >> np.arange(bits)) & 1
    packed = np.packbits(single.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little")
    return packed.view(np.int32)


def stored(
    weight: Any, bits: int = 4, group: int = 64, sym: bool = False
) -> tuple[dict[str, Any], np.ndarray]:
    """The stored tensors of one layer's weight (outputs, inputs), and the (outputs, inputs) float32 that they mean."""
    import torch

    matrix = weight.float().numpy().T
    inputs, outputs = matrix.shape
    size = inputs if group < 0 else group
    grouped, top = matrix.reshape(inputs // size, size, outputs), 2**bits - 1
    low, high = np.minimum(grouped.min(1), 0), np.maximum(grouped.max(1), 0)
    if sym:
        scale = np.abs(grouped).max(1) / (2 ** (bits - 1) - 1)
    else:
        scale = (high - low) / top
    scale = np.maximum(scale, 1e-4).astype(np.float16).astype(np.float32)
    zero = np.full(scale.shape, 2.0 ** (bits - 1)) if sym else np.clip(np.round(-low / scale), 0, top)
    code = np.clip(np.round(grouped / scale[:, None]) + zero[:, None], 0, top).astype(np.int64)
    tensors = {
        "qweight": torch.from_numpy(words(code.reshape(inputs, outputs), bits)),
        "qzeros": torch.from_numpy(words(zero.astype(np.int64), bits)),
        "scales": torch.from_numpy(scale).half(),
    }
    plain = (code - zero[:, None]) * scale[:, None]
    return tensors, plain.reshape(inputs, outputs).T.astype(np.float32)


def quantized(
    source: Path,
    target: Path,
    bits: int = 4,
    group: int = 64,
    sym: bool = False,
    kept: tuple[str, ...] = (),
    **config: Any,
) -> dict[str, np.ndarray]:
    """`source` as an AWQ checkpoint in `target`; returns what each packed weight means. `kept`: parts of the names of
    linear layers that stay as they are."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors, meant = {}, {}
    loaded = {n: t for file in source.glob("*.safetensors") for n, t in load_file(file).items()}
    for name, tensor in loaded.items():
        stem = name.removesuffix(".weight")
        linear = tensor.dim() == 2 and ".layers." in name and not any(part in name for part in kept)
        if not linear:
            tensors[name] = tensor.half().contiguous()
            continue
        parts, meant[stem] = stored(tensor, bits, group, sym)
        tensors |= {f"{stem}.{part}": value.contiguous() for part, value in parts.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    said = {
        "quant_method": "awq",
        "bits": bits,
        "group_size": group,
        "zero_point": not sym,
        "version": "gemm",
    }
    if kept:
        said["modules_to_not_convert"] = list(kept)
    values = json.loads((target / "config.json").read_text())
    values |= {
        "torch_dtype": "float16",
        "quantization_config": {n: v for n, v in {**said, **config}.items() if v is not None},
    }
    values.pop("dtype", None)
    (target / "config.json").write_text(json.dumps(values))
    return meant


def rewrite(folder: Path, change) -> Path:
    """Change the tensors of a checkpoint: `change` gets them by name and returns what is to be stored."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file({n: t.contiguous() for n, t in tensors.items()}, file, {"format": "pt"})
    return folder
