"""GPTQ's product as one expression, against gptqmodel's own layer and against the weights unpacked independently."""

from __future__ import annotations

import gptq_models
import pytest


@pytest.fixture(scope="module")
def layers_of(tmp_path_factory):
    """Recipe → the GPTQ layers of a tiny model, loaded with the Torch kernel."""
    pytest.importorskip("gptqmodel")
    from transformers import AutoModelForCausalLM, GPTQConfig

    source = gptq_models.tiny(tmp_path_factory.mktemp("written-out") / "source", hidden_size=64)
    known = {}

    def make(bits=4, group=32, **recipe):
        key = (bits, group, *sorted(recipe.items()))
        if key not in known:
            folder = gptq_models.quantized(
                source, tmp_path_factory.mktemp("q") / "made", bits, group, **recipe
            )
            config = GPTQConfig(bits=bits, backend="gptq_torch")
            model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype="float16")
            known[key] = [m for m in model.eval().modules() if type(m).__name__ == "TorchLinear"]
        assert known[key], "transformers made no TorchLinear of it"
        return known[key]

    return make


@pytest.mark.parametrize(
    "recipe", [{}, {"bits": 8}, {"bits": 2, "group": 64}, {"sym": False}, {"group": -1}], ids=str
)
def test_the_same_product(layers_of, recipe):
    import torch

    from comparator.gptq import unpack, written_out

    for layer in layers_of(**recipe)[:7]:
        vars(layer).pop("dequantize_weight", None)
        assert written_out.applies(layer)
        x = torch.randn(1, 1, layer.in_features).half()
        with torch.inference_mode():
            got, own = written_out.row(layer, x), layer(x)
            exact = x.float() @ unpack.weight(layer).T
        assert got.shape == own.shape and got.dtype == own.dtype
        for name, other in (("gptqmodel's layer", own.float()), ("the unpacked weights", exact)):
            apart = float((got.float() - other).norm() / other.norm())
            assert apart < 2e-3, f"{apart:.1%} from {name}: a shift, a zero point or a group is off"


def test_what_is_packed_otherwise_keeps_its_kernel(layers_of):
    from comparator.gptq import written_out

    assert not written_out.applies(layers_of(desc_act=True)[0]), "its groups are not in order"
    layer = layers_of()[0]
    layer.bits = 3
    try:
        assert not written_out.applies(layer), "3 bits lie across words"
    finally:
        layer.bits = 4


def test_a_compiler_gets_the_formula_for_one_row_and_an_operation_for_more(layers_of):
    import torch

    from comparator.decode import opaque
    from comparator.gptq import written_out

    layer = layers_of()[0]
    vars(layer).pop("dequantize_weight", None)
    model = torch.nn.Sequential(layer)
    one, two = torch.randn(1, 1, layer.in_features).half(), torch.randn(1, 2, layer.in_features).half()
    with torch.inference_mode():
        own = layer(one), layer(two)
        with opaque.opaque_kernels(model) as notes:
            assert notes == (written_out.NOTE,)
            made = [
                torch.compile(lambda x: model(x), backend="aot_eager", fullgraph=True)(x) for x in (one, two)
            ]
    assert torch.equal(made[1], own[1]) and torch.allclose(made[0], own[0], atol=2e-2)
    assert "forward" not in vars(layer)
