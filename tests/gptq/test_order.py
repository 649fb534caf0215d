"""ExLlamaV2's table of the row order: left out only where the rows are in order."""

from __future__ import annotations

import pytest

from comparator.gptq import order


def test_in_order():
    import torch

    straight = torch.arange(256, dtype=torch.int32) // 64
    assert order.in_order(straight, 64)
    assert not order.in_order(straight, 32), "other groups than those of the layer"
    assert not order.in_order(straight.flip(0), 64)
    swapped = straight.clone()
    swapped[[0, 255]] = swapped[[255, 0]]
    assert not order.in_order(swapped, 64), "act-order in two rows is act-order"


def test_only_a_table_that_says_nothing_is_left_out():
    import torch

    straight = torch.arange(256, dtype=torch.int32) // 64
    tensors = {"qweight": "w", "qzeros": "z", "scales": "s", "g_idx": straight}
    assert set(order.without_table(tensors, 64)) == {"qweight", "qzeros", "scales"}
    assert "g_idx" in tensors, "the layer keeps its own"
    sorted_rows = {**tensors, "g_idx": straight.flip(0)}
    assert order.without_table(sorted_rows, 64) is sorted_rows
    assert order.without_table(tensors, -1) is tensors, "whole rows: gptqmodel leaves it out by itself"
    exl2 = {"q_weight": "w"}
    assert order.without_table(exl2, 64) is exl2


def test_gptqmodels_layer_is_made_so(monkeypatch):
    """The library's own class; what it would hand to the GPU is caught one call further down."""
    import torch

    exllamav2 = pytest.importorskip("gptqmodel.nn_modules.qlinear.exllamav2")
    kind = exllamav2.ExllamaV2Linear
    monkeypatch.setattr(kind, "validate", lambda *_, **__: (True, None))  # there is no GPU here
    monkeypatch.setattr(kind, "ext_make_q_matrix", kind.ext_make_q_matrix)  # puts the library's own back
    handed = []
    monkeypatch.setattr(exllamav2, "exllamav2_make_q_matrix", lambda *args: handed.append(args) or "handle")
    module = kind(bits=4, group_size=32, sym=True, desc_act=False, in_features=64, out_features=64)
    module.g_idx = torch.arange(64, dtype=torch.int32) // 32
    tensors = {n: getattr(module, n) for n in ("qweight", "qzeros", "scales", "g_idx")}
    module.ext_make_q_matrix(dict(tensors), None)
    assert handed[-1][1] is not None, "gptqmodel leaves the table out by itself now: this module can go"
    assert order.patch() and order.patch()
    assert module.ext_make_q_matrix(dict(tensors), None) == "handle"
    assert handed[-1][1] is None and handed[-1][8] is None, "the table is still handed over"
    module.ext_make_q_matrix({**tensors, "g_idx": module.g_idx.flip(0)}, None)
    assert handed[-1][1] is not None and handed[-1][8] is not None, "act-order needs its table"
