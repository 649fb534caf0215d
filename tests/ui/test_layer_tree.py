"""Tensors' names → the block and the part that they belong to; no tensor is lost or counted twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sample

from comparator.ui import layer_tree
from comparator.ui.layer_summary import Difference


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "Embedding"),
        ("transformer.wte.weight", "Embedding"),
        ("token_embd.weight", "Embedding"),
        ("model.layers.11.self_attn.q_proj.weight", "Attention"),
        ("model.layers.0.post_attention_layernorm.weight", "Norms"),
        ("transformer.h.3.ln_1.weight", "Norms"),
        ("transformer.h.3.attn.c_attn.weight", "Attention"),
        ("blk.7.attn_output.weight", "Attention"),
        ("blk.7.ffn_down.weight", "MLP"),
        ("model.layers.2.block_sparse_moe.experts.5.w1.weight", "MLP"),
        ("model.layers.2.mlp.gate.weight", "MLP"),
        ("model.norm.weight", "Norms"),
        ("lm_head.weight", "Head"),
        ("output.weight", "Head"),
        ("model.layers.4.mixer.A_log", "Other"),
    ],
)
def test_part_of_a_name(name, part):
    assert layer_tree.part_of(name) == part


def test_a_tree_holds_every_tensor_once():
    names = [
        "encoder.layers.0.mlp.fc1",
        "decoder.layers.0.mlp.fc1",
        "decoder.layers.1.norm",
        "lm_head",
        "embed",
        "x",
    ]
    pairs = [Difference(n, replace(sample.PLAIN, name=f"{n}.weight"), None) for n in names]
    pairs = [replace(pair, name=pair.left.name) for pair in pairs]
    roots = layer_tree.tree(pairs)
    assert [node.title for node in roots] == [
        "Embedding", "Block 0 of encoder.layers", "Block 0 of decoder.layers", "Block 1 of decoder.layers", "Other", "Head",
    ]  # fmt: skip
    for node in roots:
        inner = [pair for child in node.children for pair in child.pairs]
        assert not node.children or sorted(map(id, inner)) == sorted(map(id, node.pairs))
    assert sum(len(node.pairs) for node in roots) == len(pairs)
    keys = [n.key for root in roots for n in (root, *root.children)]
    assert len(set(keys)) == len(keys), "two groups would open and close together"
