"""What is changed in gptqmodel is where comparator/util/compat/gptqmodel.py expects it. ExLlamaV2's table of the row order
is left out only where the rows are in order.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from comparator.util.compat import gptqmodel as compat


def test_in_order():
    import torch

    straight = torch.arange(256, dtype=torch.int32) // 64
    assert compat.in_order(straight, 64)
    assert not compat.in_order(straight, 32), "other groups than those of the layer"
    assert not compat.in_order(straight.flip(0), 64)
    swapped = straight.clone()
    swapped[[0, 255]] = swapped[[255, 0]]
    assert not compat.in_order(swapped, 64), "act-order in two rows is act-order"


def test_only_a_table_that_says_nothing_is_left_out():
    import torch

    straight = torch.arange(256, dtype=torch.int32) // 64
    tensors = {"qweight": "w", "qzeros": "z", "scales": "s", "g_idx": straight}
    assert set(compat.without_table(tensors, 64)) == {"qweight", "qzeros", "scales"}
    assert "g_idx" in tensors, "the layer keeps its own"
    sorted_rows = {**tensors, "g_idx": straight.flip(0)}
    assert compat.without_table(sorted_rows, 64) is sorted_rows
    assert compat.without_table(tensors, -1) is tensors, "whole rows: gptqmodel leaves it out by itself"
    exl2 = {"q_weight": "w"}
    assert compat.without_table(exl2, 64) is exl2


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
    assert compat.skip_row_table() and compat.skip_row_table()
    assert module.ext_make_q_matrix(dict(tensors), None) == "handle"
    assert handed[-1][1] is None and handed[-1][8] is None, "the table is still handed over"
    module.ext_make_q_matrix({**tensors, "g_idx": module.g_idx.flip(0)}, None)
    assert handed[-1][1] is not None and handed[-1][8] is not None, "act-order needs its table"


def test_the_scratch_holds_the_unpacked_weight_alone(monkeypatch):
    """What `get_slice` takes of it has to be there, and the library's own is larger by far."""
    names = {"exllamav2": "ExllamaV2Linear", "exllamav2_awq": "AwqExllamaV2Linear"}
    layers = "gptqmodel.nn_modules.qlinear."
    kinds = [getattr(pytest.importorskip(layers + module), name) for module, name in names.items()]
    for kind in kinds:
        monkeypatch.setattr(kind, "temp_fwd_size", kind.temp_fwd_size)  # puts the library's own back

    def scratch(kind) -> tuple[int, int]:
        """(bytes of the unpacked weight, bytes of the whole scratch) of a layer."""
        layer = SimpleNamespace(in_features=4096, out_features=14336)
        for size in ("temp_dq_size", "temp_fwd_size"):
            setattr(layer, size, getattr(kind, size).__get__(layer))
        return layer.temp_dq_size(), kind.scratch_space_fixed(layer)

    own = [scratch(kind)[1] for kind in kinds]
    compat.unpacking_scratch_only()
    for kind, before in zip(kinds, own, strict=True):
        unpacked, made = scratch(kind)
        assert -(-unpacked // 128) * 128 <= made <= unpacked + 128
        assert made < before / 2, "gptqmodel's own is as small now: this change can go"


def test_launches_follow_the_stream():
    source = "void f() { kernel<<<gridDim, blockDim>>>(a, b); other<<<g, b, 0, stream>>>(a); }"
    changed = compat.with_stream(source)
    assert "kernel<<<gridDim, blockDim, 0, c10::cuda::getCurrentCUDAStream().stream()>>>(a, b)" in changed
    assert "other<<<g, b, 0, stream>>>(a)" in changed and changed.startswith("#include")
    assert compat.with_stream("int x;") == "int x;"


def test_the_librarys_source_is_still_what_is_changed(tmp_path):
    pytest.importorskip("gptqmodel.utils.exllamav2")
    extensions = compat._extensions()
    before = {name: extension.sources for name, extension in extensions.items()}
    try:
        assert not compat.follows_stream()
        assert compat.launch_on_stream(tmp_path), (
            "gptqmodel builds ExLlamaV2 another way now: graphs of it are refused"
        )
        assert compat.follows_stream()
        for name, extension in extensions.items():
            for source in extension.sources():
                text = open(source).read()
                assert "<<<gridDim, blockDim>>>" not in text, name
                assert source.endswith(".cpp") or "getCurrentCUDAStream" in text, name
    finally:
        for name, extension in extensions.items():
            extension.sources = before[name]


def test_an_extension_can_be_looked_up():
    extension = pytest.importorskip("gptqmodel.extension")
    assert "machete" in extension._EXTENSION_SPECS_BY_NAME  # looking further would download CUTLASS
    for name in ("exllamav2", "exllamav2_awq", "marlin_fp16", "marlin_bf16"):
        jit = extension._EXTENSION_SPECS_BY_NAME[name].resolve()
        assert isinstance(jit._ops_available(), bool)
        assert jit._candidate_binary_paths(jit.build_root()), "change extension_built"
    assert compat.extension_built("no such extension") is False
