"""max_memory's limits, and tensors that accelerate parks: with accelerate's own offloading, here from CPU to CPU."""

from __future__ import annotations

import pytest
import tiny_models

from comparator import layers, spread
from comparator.backends import backend_for, resolve
from comparator.metrics import memory
from comparator.types import Problem


@pytest.fixture
def model(tmp_path):
    return tiny_models.save(tmp_path / "tiny", "llama")


def test_a_parked_model_shows_where_it_lies_and_what_it_weighs(model):
    import torch
    from accelerate import cpu_offload

    backend = backend_for(resolve("bf16"))
    before = layers.rows(model, backend)
    held = memory.unique_bytes(memory.held_tensors(model))
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert any(p.device.type == "meta" for p in model.parameters()), "accelerate left placeholders"
    rows = layers.rows(model, backend)
    assert {row.device for row in rows} == {"cpu"}, "where the weights lie, not the placeholder"
    assert layers.totals(rows) == layers.totals(before)
    assert [row.tied_to for row in rows] == [row.tied_to for row in before]
    assert memory.unique_bytes(memory.held_tensors(model)) >= 0.99 * held


def test_limits_that_are_too_small_are_refused_with_both_figures():
    with pytest.raises(Problem) as caught:
        spread.check({"cpu": 10 * 10**6}, 300 * 10**6, "bf16")
    assert (
        "300 MB" in caught.value.problem
        and "10 MB" in caught.value.problem
        and "bf16" in caught.value.problem
    )
    spread.check({"cpu": 10**9}, 10**6, "bf16")
    assert spread.fits({"cpu": 10**9}, 10**6) and not spread.fits({"cpu": 10**6}, 10**7)


def test_what_is_not_free_is_refused():
    with pytest.raises(Problem) as caught:
        spread.check({"cpu": 10**18}, 10**17, "bf16")
    assert "is free" in caught.value.problem


def test_a_gpu_that_is_not_there_is_named():
    import torch

    count = torch.cuda.device_count()
    with pytest.raises(Problem) as caught:
        spread.first_device({count: 10**9, "cpu": 10**9})
    assert f"GPU {count}" in caught.value.problem
    assert spread.first_device({"cpu": 10**9}) == "cpu"


def test_a_part_without_a_place_is_refused(model):
    model.hf_device_map = {"model.layers.0": "cpu", "model.layers.1": "disk"}
    with pytest.raises(Problem) as caught:
        spread.check_placed(model, "bf16")
    assert "model.layers.1" in caught.value.problem
