"""The mixed-precision recipe: its rule against every choice there is, its size against what is then loaded, the command."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace

import pytest

from comparator.backends import resolve
from comparator.core.errors import UserError
from comparator.core.messages import LoadRequest
from comparator.core.result import LayerRow
from comparator.core.settings import Settings
from comparator.engine.local import LocalEngine
from comparator.fidelity import recipe, sensitivity
from comparator.fidelity.sensitivity import Part

NF4 = resolve("nf4")


def row(module: str, size: int, parameters: int = 0) -> LayerRow:
    return LayerRow(
        f"{module}.weight", "Linear", "Parameter", "bf16", "bf16", "bf16", (1,), (1,), parameters or size // 2, size, 0, 16.0, "cpu",
    )  # fmt: skip


MODULES = [f"model.layers.{n}.mlp.{kind}" for n in (1, 10) for kind in ("up_proj", "down_proj")]
LARGE = [row(m, 400 * (n + 1)) for n, m in enumerate(MODULES)]
SMALL = [replace(r, bytes=r.bytes // 4) for r in LARGE]
PARTS = [Part(m, (m,), kl, None, kl, 0.9, 8) for m, kl in zip(MODULES, (0.1, 0.5, 0.2, 0.3), strict=True)]


def test_parts_are_kept_by_divergence_per_byte() -> None:
    made = recipe.make(NF4, PARTS, SMALL, LARGE, target_bytes=1000 + 300 + 600)
    assert made.kept == (MODULES[1], MODULES[0]), (
        "0.5 over 600 bytes, then 0.1 over 300; the others do not fit"
    )
    assert made.bytes == 1000 + 600 + 300 <= 1900 and made.share == pytest.approx(0.6 / 1.1)
    assert made.variant.notation == f"nf4:skip={'+'.join(sorted(made.kept))}"
    assert recipe.make(NF4, PARTS, SMALL, LARGE, target_bits=8 * 1900 / 2000).kept == made.kept
    for target in range(1300, 4000, 50):
        made = recipe.make(NF4, PARTS, SMALL, LARGE, target_bytes=target)
        fits = [
            sum(p.kl_mean for p in some)
            for n in range(5) for some in itertools.combinations(PARTS, n)
            if 1000 + sum(300 * (MODULES.index(p.name) + 1) for p in some) <= target
        ]  # fmt: skip
        assert made.bytes <= target and made.share * 1.1 >= 0.5 * max(fits), (
            "less than half of the best choice"
        )


def test_names_mean_the_parts_modules_alone() -> None:
    layer = Part("layer 1", tuple(MODULES[:2]), 0.9, None, 0.9, 0.9, 8)
    kind = Part("mlp.up_proj", (MODULES[0], MODULES[2]), 0.1, None, 0.9, 0.9, 8)
    rest = Part("layer 10", tuple(MODULES[2:]), 0.01, None, 0.9, 0.9, 8)
    assert recipe.make(NF4, [layer, rest], SMALL, LARGE, 2500).variant.notation == "nf4:skip=model.layers.1"
    assert recipe.make(NF4, [kind], SMALL, LARGE, 3000).variant.notation == "nf4:skip=mlp.up_proj"
    assert (
        "skip=lm_head+mlp.up_proj"
        in recipe.make(resolve("nf4:skip=lm_head"), [kind], SMALL, LARGE, 3000).variant.notation
    )


def test_a_target_that_makes_no_sense_is_refused() -> None:
    for target, words in ((999, "with nothing kept"), (4000, "whole reference fits"), (1200, "No part fits")):
        with pytest.raises(UserError, match=words):
            recipe.make(NF4, PARTS, SMALL, LARGE, target_bytes=target)
    with pytest.raises(UserError, match="cannot keep"):
        recipe.check(resolve("gptq"))


def test_the_recipe_loads_with_the_size_that_it_names(two_layers) -> None:
    engine, cancel = LocalEngine(Settings()), threading.Event()
    try:
        bf16, model = resolve("bf16"), str(two_layers)
        parts = sensitivity.measure(engine, model, NF4, bf16, by="kind", tokens=16)
        handle = engine.handle_of(model, "nf4")
        size = sum(r.bytes + r.quant_state_bytes for r in engine.layers(handle))
        made = recipe.propose(engine, model, NF4, bf16, parts, target_bytes=size + 4_000_000)
        loaded = engine.load(LoadRequest(model, made.variant), cancel)
        rows = engine.layers(loaded.handle)
        assert sum(r.bytes + r.quant_state_bytes for r in rows) == made.bytes <= size + 4_000_000
        kept = [r for r in rows if any(r.name.endswith(f"{name}.weight") for name in made.kept)]
        assert kept and {r.storage_dtype for r in kept} == {"bf16"}
    finally:
        engine.unload()
