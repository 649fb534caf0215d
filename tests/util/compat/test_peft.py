"""What is replaced in peft is where comparator/util/compat/peft.py expects it."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pytest

from comparator.util.compat import peft as compat

peft = pytest.importorskip("peft")


def test_every_module_that_asks_for_gptqmodel_is_covered():
    folder = Path(peft.__file__).parent
    asking = {
        ".".join(p.relative_to(folder).with_suffix("").parts)
        for p in folder.rglob("*.py")
        if re.search(r"(?<!def )is_gptqmodel_available\(\)", p.read_text(encoding="utf-8"))
    }
    assert asking == set(compat.ASKING), "peft asks for gptqmodel in other modules now: change ASKING"
    before = [import_module(f"peft.{name}").is_gptqmodel_available for name in asking]
    with compat.without_gptqmodel():
        assert not any(import_module(f"peft.{name}").is_gptqmodel_available() for name in asking)
    assert [import_module(f"peft.{name}").is_gptqmodel_available for name in asking] == before


def test_dora_with_a_cached_norm_equals_pefts():
    import torch
    from peft.tuners.lora.dora import DoraLinearLayer

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4, bias=False))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], use_dora=True, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config).eval().requires_grad_(False)
    x = torch.randn(3, 8)
    expected = wrapped(x)
    asked = []
    compat.cache_dora_norms(wrapped, lambda module: asked.append(module))
    torch.testing.assert_close(wrapped(x), expected)
    torch.testing.assert_close(wrapped(x), expected)
    assert len(asked) == 2, "the norm is taken anew at every step, or peft calls DoRA's forward no longer"
    taken = set(inspect.signature(DoraLinearLayer.forward).parameters)
    assert taken == {
        "self",
        "x",
        "lora_A",
        "lora_B",
        "scaling",
        "base_layer",
        "base_result",
        "adapter_name",
    }, "peft passes DoRA other arguments now: change _dora_forward"
