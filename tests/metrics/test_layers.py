"""The per-layer table answers “is load_in_4bit really 4-bit?” on real weights, as loaded and as they run."""

from __future__ import annotations

import threading

import pytest

from comparator.backends import resolve
from comparator.core.messages import LoadRequest


@pytest.fixture(scope="module")
def rows(engine, two_layers):
    """`rows("nf4")`: (its rows by name, the loaded model)."""

    def read(notation: str):
        loaded = engine.load(LoadRequest(str(two_layers), resolve(notation)), threading.Event())
        return {r.name: r for r in engine.layers(loaded.handle)}, loaded

    return read


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def test_full_precision(rows):
    table, _ = rows("bf16")
    row = table[Q_PROJ]
    assert (row.storage_dtype, row.shape, row.storage_shape) == ("bf16", (576, 576), (576, 576))
    assert row.bits_per_weight == 16 and row.quant_state_bytes == 0
    assert table["lm_head.weight"].tied_to == "model.embed_tokens.weight"
    assert table["lm_head.weight"].bytes == 0, "tied weights are one storage and count once"


def test_four_bit_says_two_values_in_a_byte(rows):
    table, loaded = rows("nf4")
    row = table[Q_PROJ]
    assert row.storage_dtype == "uint8" and row.logical_dtype == "nf4" and row.compute_dtype == "bf16"
    assert row.shape == (576, 576), "the logical shape, not the packed one"
    assert row.parameters == 576 * 576 and row.bytes == 576 * 576 // 2
    assert 4 < row.bits_per_weight < 5
    assert {p.name for p in row.state} >= {"absmax", "codebook"}
    was = row.loaded.storage_shape if row.loaded else row.storage_shape
    assert was == (576 * 576 // 2, 1), "as loaded, bitsandbytes keeps a column of bytes"
    assert bool(row.loaded) == any("Repacked at first use" in n for n in loaded.notes)


def test_storage_dtype_changes_the_label_not_the_bytes(rows):
    plain, other = rows("nf4:storage=bf16")[0][Q_PROJ], rows("nf4")[0][Q_PROJ]
    was = plain.loaded.storage_dtype if plain.loaded else plain.storage_dtype
    assert was == "bf16" and plain.bytes == other.bytes


def test_int8_counts_its_scales(rows):
    row = rows("int8")[0][Q_PROJ]
    assert row.storage_dtype == "int8" and row.bytes == 576 * 576
    assert row.quant_state_bytes == 576 * 4, "one float32 scale per row, wherever the library keeps it"
    assert "fp16 outliers" in row.compute_dtype
    assert "outliers" not in rows("int8:threshold=0")[0][Q_PROJ].compute_dtype


def test_skipped_modules_stay(rows):
    table = rows("nf4:skip=lm_head+q_proj,dtype=fp32")[0]
    assert table[Q_PROJ].storage_dtype == "fp32"
    assert table[Q_PROJ.replace("q_proj", "k_proj")].logical_dtype == "nf4"
    assert table["model.norm.weight"].storage_dtype == "fp32"


@pytest.mark.parametrize("notation", ["int8", "nf4", "nf4:dq", "fp4"])
def test_dequantized_weights_are_near_the_originals(engine, rows, notation):
    """`dequantize` reads the packed bytes as they are now, repacked for AVX-512 or not."""
    reference = rows("fp32")[1].handle
    quantized = rows(notation)[1].handle

    def errors():
        import torch

        slot = engine._pool.get(quantized)
        for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
            exact = engine._pool.get(reference).model.get_submodule(name).weight
            made = slot.backend.dequantize(slot.model.get_submodule(name))
            assert made.shape == exact.shape
            yield float(torch.linalg.norm(made - exact) / torch.linalg.norm(exact))

    limit = 0.02 if notation == "int8" else 0.16
    for error in engine._call(lambda: list(errors())):
        assert 0 < error < limit, f"{notation} is {error:.3f} away: the packed layout is read wrongly"
