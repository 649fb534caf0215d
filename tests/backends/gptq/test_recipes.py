"""Every recipe of GPTQ on tiny random models: packed is what was rounded."""

from __future__ import annotations

import gptq_models
import pytest

from comparator.backends import backend_for, resolve
from comparator.core.errors import UserError
from comparator.sources import open_checkpoint

PROMPT = "The capital of France is"
GPTQ = backend_for(resolve("gptq"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random llama whose layers are small multiples of 32, quantized as each test asks; (source, target maker)."""
    source = gptq_models.tiny(
        tmp_path_factory.mktemp("gptq") / "tiny", "llama", hidden_size=64, intermediate_size=128
    )
    return source


@pytest.mark.parametrize(
    "recipe",
    [
        {"bits": 2}, {"bits": 3}, {"bits": 8}, {"group_size": 32}, {"group_size": -1}, {"desc_act": True},
        {"sym": False}, {"bits": 3, "sym": False}, {"bits": 8, "desc_act": True, "sym": False}, {"bits": 2, "group_size": -1},
    ],
    ids=str,
)  # fmt: skip
def test_every_recipe_packs_what_it_rounded(tiny, tmp_path, recipe):
    """Random weights: the error has to be that of so many bits, and the kernel has to multiply those very weights."""
    import torch
    from transformers import AutoModelForCausalLM, GPTQConfig

    recipe = {"bits": 4, "group_size": 64, **recipe}
    target = gptq_models.quantized(tiny, tmp_path / "made", **recipe)
    model = AutoModelForCausalLM.from_pretrained(
        target, dtype=torch.float16, device_map="cpu",
        quantization_config=GPTQConfig(bits=recipe["bits"], backend="gptq_torch"),
    )  # fmt: skip
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    count = 0
    for name, module in model.named_modules():
        vars(module).pop("dequantize_weight", None)
        if (weight := GPTQ.dequantize(module)) is None:
            continue
        count += 1
        before = plain.get_submodule(name).weight.data
        error = float((weight - before).norm() / before.norm())
        bound = {2: 0.75, 3: 0.35, 4: 0.18, 8: 0.012}[recipe["bits"]]
        assert error < bound, f"{name}: relative error {error:.3f} with {recipe}"
        x = torch.randn(3, module.in_features, dtype=torch.float16)
        assert torch.allclose(module(x).float(), x.float() @ weight.T, atol=0.02), (
            f"{name} multiplies something else"
        )
    assert count == 14, "seven layers in each of two blocks"


def test_layers_with_a_bias(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, GPTQConfig

    source = gptq_models.tiny(tmp_path / "opt", "opt", hidden_size=64, word_embed_proj_dim=64)
    target = gptq_models.quantized(source, tmp_path / "opt-gptq", 8, 32)
    plain = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for parameter in plain.parameters():
        assert parameter.isfinite().all()
    packed = AutoModelForCausalLM.from_pretrained(
        target,
        dtype=torch.float16,
        quantization_config=GPTQConfig(bits=8, backend="gptq_torch"),
        device_map="cpu",
    )
    for module in packed.modules():
        vars(module).pop("dequantize_weight", None)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        one, other = plain(ids).logits, packed(ids).logits.float()
    assert (one - other).abs().max() < 0.05 * one.abs().max(), "8 bits should hardly show"


def test_what_transformers_cannot_load_is_refused_before_quantizing(tmp_path):
    source = gptq_models.tiny(tmp_path / "gpt2", "gpt2", n_embd=64)
    with pytest.raises(UserError) as caught:
        GPTQ.complete(resolve("gptq"), open_checkpoint(str(source)))
    assert "GPT2LMHeadModel" in caught.value.problem and "nf4" in caught.value.advice
