"""GPTQ checkpoints that would load and answer wrongly are refused by name, from headers and a few zero points."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models

from comparator.backends.gptq import ready_made
from comparator.core.errors import UserError
from comparator.sources import open_checkpoint

CONFIG = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def zeros(rows: int, columns: int, value: int, bits: int):
    """(rows, columns·bits/32) int32 of one value packed everywhere."""
    import numpy as np
    import torch

    word = sum(value << bits * i for i in range(32)).to_bytes(4 * bits, "little")
    data = np.frombuffer(word * (rows * columns // 32), np.int32).copy()
    return torch.from_numpy(data).reshape(rows, columns * bits // 32)


def make(
    folder: Path, bits: int = 4, value: int | None = None, odd: dict | None = None, plain: str = "-", **config
) -> Path:
    """A tiny Llama as GPTQ stores it. `odd`: a module's own bits by name; `plain`: a module that stays unpacked."""
    import torch
    from safetensors.torch import load_file, save_file

    tiny_models.save(folder, "llama", tie_word_embeddings=False, dtype="float16", hidden_size=128)
    made = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if not ("_proj" in name or (stem == "lm_head" and config.get("lm_head"))) or plain in name:
            made[name] = tensor
            continue
        own, (rows, columns) = (odd or {}).get(stem, bits), tensor.shape
        middle = 2 ** (own - 1) - 1 if value is None else value
        made |= {
            f"{stem}.qweight": torch.ones(columns * own // 32, rows, dtype=torch.int32),
            f"{stem}.qzeros": zeros(columns // 32, rows, middle, own),
            f"{stem}.scales": torch.ones(columns // 32, rows, dtype=torch.float16),
            f"{stem}.g_idx": torch.arange(columns, dtype=torch.int32) // 32,
        }
    save_file(made, folder / "model.safetensors", {"format": "pt"})
    values = json.loads((folder / "config.json").read_text())
    values["quantization_config"] = {**CONFIG, "bits": bits, **config}
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        ready_made.read(open_checkpoint(str(folder)))
    assert caught.value.advice
    for word in words:
        assert word in str(caught.value), f"“{word}” is missing from: {caught.value}"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_zero_points_as_the_config_labels_them_pass(tmp_path: Path, bits: int, version: str) -> None:
    value = 2 ** (bits - 1) - (version == "gptq")
    ready = ready_made.read(open_checkpoint(str(make(tmp_path, bits, value, checkpoint_format=version))))
    assert (ready.bits, ready.version) == (bits, version)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_the_other_format_are_refused(tmp_path: Path, bits: int) -> None:
    make(tmp_path / "v2 as v1", bits, 2 ** (bits - 1))
    refused(tmp_path / "v2 as v1", "stored as gptq,", "stored as gptq_v2", "checkpoint_format")
    make(tmp_path / "v1 as v2", bits, 2 ** (bits - 1) - 1, checkpoint_format="gptq_v2")
    refused(tmp_path / "v1 as v2", "stored as gptq_v2,", "stored as gptq:")


def test_unsymmetric_zero_points_may_be_anything(tmp_path: Path) -> None:
    ready_made.read(open_checkpoint(str(make(tmp_path, value=8, sym=False))))


def test_a_quantized_head_is_refused(tmp_path: Path) -> None:
    refused(make(tmp_path, lm_head=True), "lm_head.qweight", "random")


def test_settings_per_module_are_refused_where_they_change_anything(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    refused(
        make(tmp_path / "bits", odd={name: 8}, dynamic={f"+:{name}": {"bits": 8}}), name, "8 bits", "dynamic"
    )
    refused(make(tmp_path / "plain", plain=name, dynamic={f"-:{name}": {}}), f"{name}.weight", "dynamic")
    refused(make(tmp_path / "groups", group_size=64), "group", "64")
    ready_made.read(open_checkpoint(str(make(tmp_path / "none", dynamic={"-:lm_head": {}}))))


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = make(tmp_path) / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".layers.1." not in n}, file, {"format": "pt"})
    refused(tmp_path, "of the weights", "layer 1")
