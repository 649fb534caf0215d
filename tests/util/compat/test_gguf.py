"""What is replaced in gguf is where comparator/util/compat/gguf.py expects it."""

from __future__ import annotations

import inspect

import pytest

from comparator.util.compat import gguf as compat

gguf = pytest.importorskip("gguf")


def test_what_transformers_asks_for_again_and_again_is_kept(monkeypatch):
    from transformers import modeling_gguf_pytorch_utils as loader

    monkeypatch.setattr(gguf, "GGUFReader", gguf.GGUFReader)  # puts the library's own back
    monkeypatch.setattr(gguf, "get_tensor_name_map", gguf.get_tensor_name_map)
    compat.read_once()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
    source = inspect.getsource(loader)
    assert "        from gguf import GGUFReader" in source and "get_tensor_name_map" in source, (
        "transformers takes these when it is imported, or not at all: change read_once"
    )
