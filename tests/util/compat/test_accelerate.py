"""accelerate's hooks are where comparator/util/compat/accelerate.py expects them."""

from __future__ import annotations

import pytest

from comparator.util.compat import accelerate as compat

accelerate = pytest.importorskip("accelerate")


def test_the_tensors_behind_the_placeholders():
    import torch

    layer = torch.nn.Linear(2, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    assert compat.offloaded(layer) == []
    accelerate.cpu_offload(layer, execution_device=torch.device("cpu"))
    assert layer.weight.device.type == "meta", "accelerate offloads in another way"
    assert hasattr(layer, "_hf_hook"), "accelerate keeps its hook elsewhere: change _hooks"
    tensors = compat.offloaded(layer)
    assert [tuple(t.shape) for t in tensors] == [(3, 2), (3,)]
    assert torch.equal(tensors[0], weight) and torch.equal(tensors[1], bias)
    assert compat.real(layer, "weight", weight) is weight
