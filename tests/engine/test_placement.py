"""max_memory's limits, and tensors that accelerate parks: with accelerate's own offloading, here from CPU to CPU."""

from __future__ import annotations

import pytest
import tiny_models

from comparator.backends import backend_for, resolve
from comparator.core.errors import UserError
from comparator.engine import placement
from comparator.metrics import layers, memory


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
    with pytest.raises(UserError) as caught:
        placement.check({"cpu": 10 * 10**6}, 300 * 10**6, "bf16")
    assert (
        "300 MB" in caught.value.problem
        and "10 MB" in caught.value.problem
        and "bf16" in caught.value.problem
    )
    placement.check({"cpu": 10**9}, 10**6, "bf16")
    assert placement.fits({"cpu": 10**9}, 10**6) and not placement.fits({"cpu": 10**6}, 10**7)


def test_what_is_not_free_is_refused():
    with pytest.raises(UserError) as caught:
        placement.check({"cpu": 10**18}, 10**17, "bf16")
    assert "is free" in caught.value.problem


def test_a_gpu_that_is_not_there_is_named():
    import torch

    count = torch.cuda.device_count()
    with pytest.raises(UserError) as caught:
        placement.first_device({count: 10**9, "cpu": 10**9})
    assert f"GPU {count}" in caught.value.problem
    assert placement.first_device({"cpu": 10**9}) == "cpu"


GB = 10**9


def test_a_variant_for_one_gpu_is_never_spread():
    rooms = {0: 80 * GB, 1: 48 * GB}
    assert placement.automatic(70 * GB, GB, rooms) is None, "it fits the larger one"
    assert (
        placement.automatic(140 * GB, GB, {}) is None
        and placement.automatic(140 * GB, GB, {0: 80 * GB}) is None
    )
    assert placement.automatic(140 * GB, GB, rooms) is None, (
        "all together cannot hold it either: refused, not spread"
    )


def test_what_fits_no_single_gpu_takes_several():
    assert placement.automatic(100 * GB, GB, {1: 48 * GB, 0: 80 * GB}) == {0: 79 * GB, 1: 47 * GB}
    eight = placement.automatic(500 * GB, GB, dict.fromkeys(range(8), 80 * GB))
    assert len(eight) == 8 and sum(eight.values()) >= 500 * GB


def test_limits_leave_alone_what_others_hold():
    free = memory.device_total_and_free("cpu")[1]
    limited = placement.within_free({"cpu": 10**18}, GB)
    assert abs(limited["cpu"] - (free - GB)) < 0.5 * GB
    assert placement.within_free({"cpu": 10}, 10**18) == {"cpu": 0}


def test_the_limits_are_what_accelerate_places_by(tmp_path):
    """Two GPUs of this size, as accelerate sees them: every layer finds a place, none on both."""
    from accelerate import infer_auto_device_map, init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    model = tiny_models.save(tmp_path / "tiny", "llama", num_hidden_layers=8)
    needed = memory.unique_bytes(memory.held_tensors(model))
    limits = placement.automatic(needed, 0, {0: int(needed * 0.7), 1: int(needed * 0.7)})
    with init_empty_weights():
        empty = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path / "tiny"))
    placed = infer_auto_device_map(empty, max_memory=limits, no_split_module_classes=empty._no_split_modules)
    assert set(placed.values()) == {0, 1}, placed
