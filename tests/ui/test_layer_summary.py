"""Layer rows in a person's words: what is stored as what, and why a dtype says uint8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sample

from comparator.ui import layer_summary


@pytest.mark.parametrize(
    ("logical", "storage", "said"),
    [
        ("nf4", "uint8", "4-bit values (nf4), two in each uint8 byte"),
        ("fp4", "bf16", "4-bit values (fp4), four in each bf16"),
        ("nf4", "fp32", "4-bit values (nf4), eight in each fp32"),
        ("int8", "int8", "8-bit integers, one scale per row"),
        ("bf16", "bf16", "plain bf16 numbers"),
        ("int4 (GPTQ)", "int32", "4-bit values (int4 (GPTQ)), eight in each int32"),
        ("int3 (GPTQ)", "int32", "3-bit values (int3 (GPTQ)), packed into int32"),
    ],
)
def test_how_a_tensor_is_kept(logical, storage, said):
    assert (
        layer_summary.in_words(replace(sample.PACKED, logical_dtype=logical, storage_dtype=storage)) == said
    )


def test_kinds_count_every_byte_once():
    groups = layer_summary.kinds(sample.NF4.layers)
    assert sum(k.bytes for k in groups) == sum(r.bytes for r in sample.NF4.layers)
    assert sum(k.tensors for k in groups) == 2, "the tied head has no bytes of its own"
    packed = next(k for k in groups if k.logical_dtype == "nf4")
    assert packed.bits_per_weight == pytest.approx(8 * (442368 + 27712) / 884736)


def test_the_uint8_question_is_answered_where_it_arises():
    said = layer_summary.why_the_dtype(sample.NF4)
    assert said.startswith("Why does the dtype say uint8?")
    assert "1,536 × 576" in said and "1,536 × 288" in said, "with this column's own tensor"
    assert "4.00 bits per weight, and 0.25 more for its scales" in said
    assert layer_summary.why_the_dtype(sample.REFERENCE) == "", "nothing is packed in bf16"


def test_headline():
    assert layer_summary.headline(sample.REFERENCE).startswith("Nothing is quantized")
    said = layer_summary.headline(sample.NF4)
    assert "are nf4 at 4.25 bits per weight" in said and "stay in bf16" in said
    assert layer_summary.headline(replace(sample.NF4, layers=())) == ""


def test_diff_of_two_columns():
    pairs = {d.name: d for d in layer_summary.diff(sample.REFERENCE, sample.NF4)}
    assert pairs["model.embed_tokens.weight"].same
    assert not pairs["model.layers.0.mlp.up_proj.weight"].same
    only = layer_summary.diff(
        sample.REFERENCE, replace(sample.NF4, layers=(replace(sample.PACKED, name="new"),))
    )
    assert [d.name for d in only if d.left is None] == ["new"]
    assert len([d for d in only if d.right is None]) == 3


def test_search_takes_several_words_in_any_case():
    assert layer_summary.matches("model.layers.3.self_attn.q_proj.weight uint8", "Layers.3 UINT8")
    assert not layer_summary.matches("model.layers.3.self_attn.q_proj.weight", "layers.3 v_proj")
    assert layer_summary.matches("anything", "")
