"""AWQ checkpoints made by hand: rounded to the nearest level and packed with numpy, independent of gptqmodel and of us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output of eight lies in each half byte of a word, from the lowest


def words(values: np.ndarray, bits: int, shuffled: bool = True) -> np.ndarray:
    """(rows, outputs) codes → (rows, outputs × bits ÷ 32) int32, bit by bit; `shuffled`: 4-bit codes in AutoAWQ's order."""
    if bits == 4 and shuffled:
        values = values.reshape(len(values), -1, 8)[:, :, ORDER].reshape(values.shape)
    single = (values[:, :, None] >> np.arange(bits)) & 1
    packed = np.packbits(single.reshape(len(values), -1).astype(np.uint8), axis=1, bitorder="little")
    return packed.view(np.int32)


def levels(weight: Any, bits: int = 4, group: int = 64, sym: bool = False) -> tuple[np.ndarray, ...]:
    """A weight (outputs, inputs) → codes (inputs, outputs), zeros and scales (groups, outputs), and the (outputs, inputs)
    float32 that they mean."""
    matrix = weight.float().numpy().T
    inputs, outputs = matrix.shape
    size = inputs if group < 0 else group
    grouped, top = matrix.reshape(inputs // size, size, outputs), 2**bits - 1
    low, high = np.minimum(grouped.min(1), 0), np.maximum(grouped.max(1), 0)
    scale = np.abs(grouped).max(1) / (2 ** (bits - 1) - 1) if sym else (high - low) / top
    scale = np.maximum(scale, 1e-4).astype(np.float16).astype(np.float32)
    zero = np.full(scale.shape, 2.0 ** (bits - 1)) if sym else np.clip(np.round(-low / scale), 0, top)
    code = np.clip(np.round(grouped / scale[:, None]) + zero[:, None], 0, top).astype(np.int64)
    plain = (code - zero[:, None]) * scale[:, None]
    meant = plain.reshape(inputs, outputs).T.astype(np.float32)
    return code.reshape(inputs, outputs), zero.astype(np.int64), scale, meant


def stored(
    weight: Any, bits: int = 4, group: int = 64, sym: bool = False
) -> tuple[dict[str, Any], np.ndarray]:
    """The tensors of one layer as AWQ stores it, and what they mean."""
    import torch

    code, zero, scale, meant = levels(weight, bits, group, sym)
    tensors = {
        "qweight": torch.from_numpy(words(code, bits)),
        "qzeros": torch.from_numpy(words(zero, bits)),
        "scales": torch.from_numpy(scale).half(),
    }
    return tensors, meant


def stored_as_gptq(
    weight: Any, bits: int = 4, group: int = 64, sym: bool = True, less: int = 1
) -> tuple[dict[str, Any], np.ndarray]:
    """The tensors of one layer as AutoRound stores it in GPTQ's layout, without g_idx, and what they mean. `less`: what
    is taken off the zero points."""
    import torch

    code, zero, scale, meant = levels(weight, bits, group, sym)
    tensors = {
        "qweight": torch.from_numpy(words(code.T, bits, shuffled=False).T.copy()),
        "qzeros": torch.from_numpy(words((zero - less) % 2**bits, bits, shuffled=False)),
        "scales": torch.from_numpy(scale).half(),
    }
    return tensors, meant


def quantized(
    source: Path,
    target: Path,
    bits: int = 4,
    group: int = 64,
    sym: bool = False,
    kept: tuple[str, ...] = (),
    pack: Any = stored,
    **config: Any,
) -> dict[str, np.ndarray]:
    """`source` as an AWQ checkpoint in `target`; returns what each packed weight means. `pack`: a layer in another
    layout. `kept`: parts of the names of linear layers that stay as they are."""
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
        parts, meant[stem] = pack(tensor, bits, group, sym)
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
