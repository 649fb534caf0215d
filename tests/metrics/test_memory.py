"""Bytes counted once per storage, and peaks that count only what runs inside."""

from __future__ import annotations

from comparator.metrics import memory


def test_views_and_ties_count_once():
    import torch

    base = torch.zeros(1000, dtype=torch.float32)
    assert memory.unique_bytes([base, base[:10], base.view(10, 100)]) == 4000
    assert memory.unique_bytes([base, base.clone()]) == 8000


def test_hidden_tensors_are_found():
    import torch

    module = torch.nn.Linear(4, 4, bias=False)
    module.weight.secret = torch.zeros(7)
    module.cache = {"a": [torch.zeros(3)]}
    module.register_buffer("unsaved", torch.zeros(5), persistent=False)
    sizes = sorted(t.numel() for t in memory.held_tensors(module))
    assert sizes == [3, 5, 7, 16]


def test_a_peak_counts_only_its_own_block():
    import torch

    with memory.track("cpu"):
        torch.ones(60_000_000)  # 240 MB, gone before the second block
    memory.give_back()
    with memory.track("cpu") as quiet:
        pass
    peaks = []
    for _ in range(
        3
    ):  # a kernel short of memory may take file pages from the process meanwhile, which hides a rise
        with memory.track("cpu") as busy:
            torch.ones(20_000_000)
        peaks.append(busy.above_bytes)
    assert quiet.above_bytes < 30e6, "the peak before the block leaked into it"
    assert 60e6 < max(peaks) < 160e6
    assert "process" in busy.source


def test_cache_bytes():
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4), 0)
    assert memory.cache_bytes(cache) == 2 * 1 * 2 * 5 * 4 * 4
    assert memory.cache_bytes(None) is None
