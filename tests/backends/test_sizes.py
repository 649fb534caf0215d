"""What is estimated before loading against what is really held after the first forward pass, for every method at once."""

from __future__ import annotations

import pytest
import tiny_models

import comparator
from comparator.backends import backend_for, resolve
from comparator.sources import open_checkpoint

NOTATIONS = (
    "fp32", "bf16", "fp16", "int8", "nf4", "nf4:dq", "fp4:dtype=fp32", "torchao", "torchao:scheme=fp8",
    "torchao:scheme=intx4", "hqq", "hqq:8bit", "hqq:3bit", "gptq", "awq", "gguf", "gguf:q4_0", "gguf:q4_k_m",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_models.save(
        folder, dtype="bfloat16", hidden_size=256, intermediate_size=512, tie_word_embeddings=False
    )
    return str(folder)


@pytest.mark.parametrize("notation", NOTATIONS)
def test_the_estimate_is_what_is_resident(model, notation):
    if reason := backend_for(resolve(notation)).unavailable():
        pytest.skip(reason)
    checkpoint = open_checkpoint(model)
    run = comparator.run("1 2 3", [notation], model, fidelity="none", max_new_tokens=2, repeats=1)
    (cell,) = run.cells
    assert cell.status == "ok", cell.error
    variant = resolve(cell.variant)
    sizes = list(backend_for(variant).tensor_sizes(variant, checkpoint, "cpu"))
    held = cell.memory.resident_bytes
    if cell.kernel.startswith("llama.cpp"):  # whose resident bytes count its context's buffers too
        held = cell.memory.weight_bytes + sum(s.copy_bytes for s in sizes)
    assert sum(s.bytes for s in sizes) == pytest.approx(held, rel=0.03), (
        f"{notation}: its tensor_sizes differ from what the library holds, which may have repacked at first use"
    )
    assert sum(s.weight_bytes for s in sizes) == pytest.approx(cell.memory.weight_bytes, rel=0.03), "weights"
