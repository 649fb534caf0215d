"""Where the tensors of one model lie."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from comparator.core.errors import UserError
from comparator.runtimes.transformers import devices


def test_a_part_without_a_place_is_refused():
    model = SimpleNamespace(hf_device_map={"model.layers.0": "cpu", "model.layers.1": "disk"})
    with pytest.raises(UserError) as caught:
        devices.check_placed(model, "bf16")
    assert "model.layers.1" in caught.value.problem


def test_a_column_on_several_devices_names_them():
    assert devices.note({("cpu", 1): 10**6}) is None
    said = devices.note({("cuda:0", 1): 3 * 10**9, ("cuda:1", 2): 10**9, ("cuda:0", 3): 10**9})
    assert "cuda:0 (4,000 MB), cuda:1 (1,000 MB)" in said
