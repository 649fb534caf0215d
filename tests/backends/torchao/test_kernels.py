"""torchao's layouts for CUDA without their kernels, one row in a graph, adapters and training."""

from __future__ import annotations

import copy
import importlib.util
import shutil
import threading
from pathlib import Path

import pytest
from torchao_models import AO, CPU, NEW, ON_CPU, PROMPT, generated, plain, quantized

from comparator.backends import resolve, row_matmul
from comparator.backends.base import AdapterKind
from comparator.backends.torchao import int8_row
from comparator.backends.torchao.schemes import BY_NAME, SCHEMES, config
from comparator.core.errors import UserError
from comparator.core.messages import LoadRequest
from comparator.core.request import GenerationSettings
from comparator.core.variant import parse_adapter
from comparator.metrics import layers
from comparator.sources import open_checkpoint
from comparator.training import memory_estimate
from comparator.training.settings import TrainSettings
from comparator.util.compat.torch import plain_tensors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="torchao is not installed"
)

# ---------------------------------------------------------------- for CUDA only: all but the kernel


@pytest.mark.parametrize(("scheme", "way"), [("int4", "intx4"), ("fp8dyn", "scheme=fp8")])
def test_cuda_only_schemes_are_refused_on_a_cpu_before_loading(checkpoint, scheme, way, monkeypatch):
    variant = AO.complete(resolve(f"torchao:scheme={scheme}"), checkpoint)
    with pytest.raises(UserError, match=f"{scheme} runs on CUDA only") as caught:
        AO.prepare(checkpoint, variant, CPU, lambda *_: None)
    assert way in caught.value.advice


def tiled(outputs: int, inputs: int, group: int):
    """A weight in tinygemm's layout, which only CUDA can fill: random codes, scales and zero points of the right shapes."""
    import torch
    from torchao.quantization import Int4TilePackedTo4dTensor

    rows, columns = -(-outputs // 8) * 8, -(-inputs // 1024) * 1024
    codes = torch.randint(-(2**31), 2**31 - 1, (rows // 8, columns // 128, 32, 4), dtype=torch.int32)
    scales = torch.rand(columns // group, rows, 2).to(torch.bfloat16)
    return Int4TilePackedTo4dTensor(codes, scales, [1, group], torch.Size((outputs, inputs)))


@pytest.fixture(scope="module")
def int4(two_layers, tmp_path_factory) -> Path:
    """A checkpoint in tinygemm's layout."""
    import torch

    folder = tmp_path_factory.mktemp("torchao") / "int4"
    model = plain(two_layers, "int8", "row")
    for name in quantized(model):
        module = model.get_submodule(name.removesuffix(".weight"))
        module.weight = torch.nn.Parameter(tiled(*module.weight.shape, 64), requires_grad=False)
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.config.quantization_config.quant_type = config(BY_NAME["int4"], "64")
    model.save_pretrained(folder)
    for file in two_layers.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def test_a_checkpoint_in_tinygemms_layout_without_its_kernel(int4, checkpoint):
    """Its options, bytes and layer rows; 576 inputs are padded to 1,024."""
    variant = AO.complete(resolve(f"torchao@{int4}"), checkpoint)
    assert variant.notation.endswith(":group=64,scheme=int4")
    with pytest.raises(UserError, match="int4 runs on CUDA only"):
        AO.load(checkpoint, variant, CPU, lambda *_: None)
    model = AO.load_opened(variant, CPU, lambda *_: None, dtype="bf16")
    rows = {row.name: row for row in layers.rows(model, AO)}
    row = rows["model.layers.0.self_attn.k_proj.weight"]
    assert (row.logical_dtype, row.storage_dtype, row.compute_dtype) == ("int4 (torchao)", "int32", "bf16")
    assert row.shape == (192, 576) and row.storage_shape == (24, 8, 32, 4) and row.bytes == 192 * 1024 // 2
    assert row.quant_state_bytes == 1024 // 64 * 192 * 2 * 2
    assert [s.name for s in row.state] == ["scale and zero point"]
    held = sum(r.bytes + r.quant_state_bytes for r in rows.values())
    assert AO.needed_bytes(variant, checkpoint) == held
    assert AO.needed_bytes(resolve("torchao:scheme=int4"), checkpoint) == held
    assert all(AO.on_parallel_streams(m) for m in model.modules() if AO.owns(m))


def test_fp8_with_rounded_activations_without_its_kernel(two_layers):
    import torch
    from torchao.float8.inference import Float8MMConfig
    from torchao.quantization import Float8Tensor, PerRow
    from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

    model = plain(two_layers, "fp8", "row")
    for module in model.modules():
        if AO.owns(module):
            rounding = QuantizeTensorToFloat8Kwargs(torch.float8_e4m3fn, PerRow())
            weight = Float8Tensor.from_hp(module.weight.dequantize(), granularity=PerRow(), act_quant_kwargs=rounding,
                                          mm_config=Float8MMConfig(use_fast_accum=True))  # fmt: skip
            module.weight = torch.nn.Parameter(weight, requires_grad=False)
    rows = layers.rows(model, AO)
    assert {r.compute_dtype for r in rows if r.name.endswith("proj.weight")} == {"fp8"}
    held = sum(r.bytes + r.quant_state_bytes for r in rows)
    assert AO.needed_bytes(resolve("torchao:scheme=fp8dyn"), open_checkpoint(str(two_layers))) == held


# ---------------------------------------------------------------- one row in a CUDA graph


@pytest.mark.parametrize("bias", [False, True])
def test_one_row_of_int8_with_rounded_activations_is_torchaos_own(models, bias):
    import torch

    torch.manual_seed(0)
    for module in models["torchao:scheme=int8dyn"].model.layers[0].mlp.children():
        if not AO.owns(module):
            continue
        module = copy.copy(module)
        if bias:
            module.bias = torch.nn.Parameter(torch.randn(module.out_features, dtype=torch.bfloat16))
        x = torch.randn(1, 1, module.in_features, dtype=torch.bfloat16)
        forward = AO.capture_forward(module)
        with torch.inference_mode():
            assert torch.equal(forward(x), module(x))
        assert AO.graph_refusal(module) is None


def test_a_step_with_it_is_captured_and_checked(two_layers, checkpoint, ids):
    """As on CUDA, but for the graph itself."""
    from comparator.decoding.planner import record
    from comparator.decoding.static_state import StaticDecodeState

    model = AO.load(checkpoint, resolve("torchao:scheme=int8dyn"), CPU, lambda *_: None).model
    _, notes, check = record(model, StaticDecodeState(model, 64), list(ids), compiled=False, greedy=True)
    assert int8_row.NOTE in notes
    assert check.layers == 0.0 and check.wrong is None and check.first_difference is None


def test_what_no_graph_can_hold_says_so(models):
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, MappingType, quantize_

    layer = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16))
    quantize_(
        layer,
        Int8DynamicActivationInt8WeightConfig(
            act_mapping_type=MappingType.ASYMMETRIC, set_inductor_config=False
        ),
    )
    assert "asymmetric" in AO.graph_refusal(layer[0]) and AO.capture_forward(layer[0]) is None
    own = models["torchao"].model.layers[0].mlp.up_proj
    assert AO.graph_refusal(own) is None and AO.capture_note(own) == row_matmul.NOTE
    assert not int8_row.rounds_activations(own.weight) and not AO.owns(models["torchao"].lm_head)


# ---------------------------------------------------------------- adapters and training


@pytest.fixture(scope="module")
def lora(two_layers, tmp_path_factory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("torchao") / "lora"
    model = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.bfloat16)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter) * 0.2
    wrapped.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("notation", "merged"),
    [
        ("torchao:scheme=int8dyn", ""),
        ("torchao:group=64,scheme=intx4", ":merged"),
        ("torchao:scheme=fp8", ""),
    ],
)
def test_a_lora_gives_pefts_own_tokens(two_layers, lora, own_engine, ids, notation, merged):
    from peft import PeftModel

    adapter, model = parse_adapter(f"{lora}{merged}"), str(two_layers)
    loaded = own_engine.load(LoadRequest(model, resolve(notation), adapter), threading.Event())
    prompt = own_engine.encode(model, PROMPT, None, False)
    settings = GenerationSettings(max_new_tokens=NEW)
    got = own_engine.generate(loaded.handle, prompt, settings, threading.Event(), adapter=adapter).token_ids
    own_engine.unload()
    base = plain(two_layers, *ON_CPU[notation][:2])
    bare = generated(base, ids)
    wrapped = PeftModel.from_pretrained(base, str(lora)).eval()
    expected = generated(wrapped.merge_and_unload() if merged else wrapped, ids)
    assert got == expected != bare


@pytest.mark.parametrize(
    ("variant", "adapter", "words"),
    [
        ("torchao", AdapterKind("a", "LoHa", "LOHA", merged=True), ["LoHa", "merge", "unmerged"]),
        ("torchao:scheme=int4", AdapterKind("a", "LoRA", "LORA", merged=True), ["int4", "merge", "unmerged"]),
        ("torchao:scheme=int4", AdapterKind("a", "DoRA", "LORA", dora=True), ["DoRA", "int4", "intx4"]),
    ],
)
def test_adapters_that_peft_cannot_put_on_are_refused_by_name(variant, adapter, words):
    with pytest.raises(UserError) as caught:
        AO.check_adapter(resolve(variant), adapter)
    assert all(word in str(caught.value) for word in words)
    AO.check_adapter(resolve(variant), AdapterKind("a", "LoRA", "LORA"))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_training_is_for_what_has_gradients(scheme, two_layers):
    import torch

    variant = resolve(f"torchao:scheme={scheme.name}")
    if not scheme.trains:
        with pytest.raises(UserError, match=f"{scheme.name}.*") as caught:
            AO.training(variant, "cpu")
        assert "scheme=fp8" in caught.value.advice
        return
    assert AO.training(variant, "cpu").dtype == "bf16"
    model = plain(two_layers, scheme.name, "row")
    assert model.hf_quantizer.is_trainable, "transformers' Trainer would refuse it"
    x = torch.randn(3, 576, dtype=torch.bfloat16, requires_grad=True)
    layer = model.model.layers[0].self_attn.q_proj
    layer(x).sum().backward()
    expected = layer.weight.dequantize().sum(0).expand(3, -1)
    assert torch.allclose(x.grad, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(("dtype", "width"), [("bf16", 2), ("fp32", 4)])
def test_the_estimate_counts_the_unpacked_weights_that_autograd_keeps(checkpoint, dtype, width):
    import torch

    variant = resolve(f"torchao:dtype={dtype}")
    model = AO.load(checkpoint, variant, CPU, lambda *_: None).model
    weights = {name: p.numel() for name, p in quantized(model).items()}
    own = {t.untyped_storage().data_ptr() for p in model.parameters() for t in plain_tensors(p)}
    kept: dict[int, int] = {}

    def keep(tensor):
        for part in plain_tensors(tensor):
            storage = part.untyped_storage()
            if storage.data_ptr() not in own and part.numel() in weights.values():
                kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    hidden = model.get_input_embeddings()(torch.tensor([[1, 2, 3]])).detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model(inputs_embeds=hidden).logits.sum()

    def activations(notation: str, checkpointing: bool) -> int:
        settings = TrainSettings(gradient_checkpointing=checkpointing)
        return memory_estimate.estimate(checkpoint, resolve(notation), settings, rows=9, longest=64, device="cpu",
                                        free_bytes=10**12).activation_bytes  # fmt: skip

    plain_dtype = activations(dtype, False)
    assert sum(kept.values()) == width * sum(weights.values())
    assert activations(variant.notation, False) - plain_dtype == pytest.approx(sum(kept.values()), rel=0.01)
    assert activations(variant.notation, True) < activations(variant.notation, False)
