"""torchao on a GPU, against plain transformers there."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest
from torchao_models import AO, NEW, ON_CPU, PROMPT, quantized

from comparator import api
from comparator.backends import resolve
from comparator.backends.torchao.schemes import BY_NAME, config
from comparator.comparison import runner
from comparator.sources import open_checkpoint

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)

# ---------------------------------------------------------------- on a GPU


ON_CUDA = [*ON_CPU, "torchao:scheme=int4", "torchao:scheme=fp8dyn", "torchao:group=tensor,scheme=fp8dyn"]


def on_cuda(folder: Path, variant, gpu: str):
    import torch
    from transformers import AutoModelForCausalLM, TorchAoConfig

    values = AO.values(variant)
    scheme = BY_NAME[values["scheme"]]
    quantization = TorchAoConfig(config(scheme, values["group"] or scheme.groups[0]))
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, device_map={"": gpu}, quantization_config=quantization
    ).eval()


@pytest.mark.gpu
@pytest.mark.parametrize("notation", ON_CUDA)
def test_on_cuda_against_plain_transformers(gpu, two_layers, own_engine, ids, notation):
    """Tokens, rows, bytes and unpacked weights, eagerly."""
    import torch

    opened = open_checkpoint(str(two_layers))
    variant = AO.complete(resolve(notation), opened)
    request = api.request(PROMPT, [variant.notation], str(two_layers), max_new_tokens=NEW, fidelity="none", chat=False,
                          decode="eager")  # fmt: skip
    (column,) = runner.run(request, engine=own_engine, emit=lambda event: None).cells
    own_engine.unload()
    assert column.status == "ok", column.error
    model = on_cuda(two_layers, variant, gpu)
    given = torch.tensor([ids], device=gpu)
    out = model.generate(
        input_ids=given, attention_mask=torch.ones_like(given), max_new_tokens=NEW, do_sample=False
    )
    assert column.token_ids == tuple(out[0].tolist())[len(ids) :]
    rows = {row.name: row for row in column.layers}
    for name, tensor in quantized(model).items():
        parts = [getattr(tensor, part) for part in tensor.__tensor_flatten__()[0]]
        assert rows[name].bytes + rows[name].quant_state_bytes == sum(p.nbytes for p in parts)
    held = sum(r.bytes + r.quant_state_bytes for r in column.layers)
    assert AO.needed_bytes(variant, opened) == pytest.approx(held, rel=0.03)
    reference = plain_weights(two_layers)
    for name, module in model.named_modules():
        if (unpacked := AO.dequantize(module)) is not None:
            whole = reference[f"{name}.weight"].to(unpacked)
            assert float((unpacked - whole).norm() / whole.norm()) < 0.2


def plain_weights(folder: Path) -> dict:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["graph", "compiled"])
@pytest.mark.parametrize("notation", ON_CUDA)
def test_a_captured_step_gives_the_eager_tokens(gpu, two_layers, own_engine, notation, decode):
    """Also that it is captured at all."""
    made = {}
    for way in ("eager", decode):
        request = api.request(
            PROMPT, [notation], str(two_layers), max_new_tokens=16, fidelity="none", chat=False, decode=way
        )
        (made[way],) = runner.run(request, engine=own_engine, emit=lambda event: None).cells
        own_engine.unload()
        assert made[way].status == "ok", made[way].error
    assert not [n for n in made[decode].notes if n.startswith(("Decoded eagerly", "Not compiled"))]
    assert made[decode].token_ids[:4] == made["eager"].token_ids[:4]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(576, 1536), (4096, 14336)])
def test_one_row_on_cuda_is_the_integer_product(gpu, shape):
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    torch.manual_seed(0)
    layer = torch.nn.Sequential(
        torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16, device=gpu)
    )
    quantize_(layer, Int8DynamicActivationInt8WeightConfig(set_inductor_config=False))
    x = torch.randn(1, 1, shape[1], dtype=torch.bfloat16, device=gpu)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            ours = AO.capture_forward(layer[0])(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    weight = layer[0].weight
    row = type(weight).from_hp(x[0], weight.act_quant_kwargs.granularity)
    product = row.qdata.double() @ weight.qdata.double().t() * row.scale.double() * weight.scale.double().t()
    assert torch.allclose(ours[0].double(), product, rtol=2**-6, atol=2**-6)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["int4", "fp8dyn"])
def test_a_checkpoint_saved_on_cuda_loads_ready_made(gpu, two_layers, own_engine, tmp_path, scheme):
    opened = open_checkpoint(str(two_layers))
    variant = AO.complete(resolve(f"torchao:scheme={scheme}"), opened)
    on_cuda(two_layers, variant, gpu).save_pretrained(tmp_path / "saved")
    for file in two_layers.glob("*token*"):
        shutil.copy(file, tmp_path / "saved")
    notations = [variant.notation, f"torchao@{tmp_path / 'saved'}"]
    request = api.request(PROMPT, notations, str(two_layers), max_new_tokens=NEW, fidelity="none", chat=False)
    made = runner.run(request, engine=own_engine, emit=lambda event: None).cells
    own_engine.unload()
    assert [c.status for c in made] == ["ok", "ok"], [c.error for c in made]
    assert made[0].token_ids == made[1].token_ids
    assert [r.bytes for r in made[0].layers] == [r.bytes for r in made[1].layers]
