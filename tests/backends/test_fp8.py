"""FP8 checkpoints, `fp8@SOURCE`: the two-layer model's real weights, rounded to FP8 in blocks here, against plain transformers
and against the scales times the stored numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import stored_formats as formats
import tiny_models

from comparator.backends import backend_for, resolve
from comparator.backends.base import Placement
from comparator.core.errors import UserError
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint
from comparator.training import base_model
from comparator.util.formatting import megabytes

FP8 = backend_for(resolve("fp8"))
CPU = Placement("cpu")
BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [64, 64]}
TENSOR = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}


def in_blocks(rows: int, columns: int):
    """Packs linear layers: absmax ÷ 448 of each block as its scale, the largest that e4m3 holds."""
    import torch

    def pack(name, weight):
        if not formats.is_linear(name):
            return None
        outputs, inputs = weight.shape
        blocks = weight.float().reshape(outputs // rows, rows, inputs // columns, columns)
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).reshape(outputs, inputs).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": scale}

    return pack


def per_tensor(name, weight):
    import torch

    if not formats.is_linear(name):
        return None
    scale = weight.float().abs().max() / 448
    codes = (weight.float() / scale).to(torch.float8_e4m3fn)
    beside = {f"{name}_scale_inv": scale, name.replace("weight", "activation_scale"): torch.tensor(0.5)}
    return {name: codes, **beside}


def unpacked(folder: Path) -> dict:
    """The weights in bf16, from the files alone: each scale over its block."""
    import torch
    from safetensors.torch import load_file

    stored, made = load_file(folder / "model.safetensors"), {}
    for name, tensor in stored.items():
        if name.endswith(("_scale_inv", "activation_scale")):
            continue
        scale = stored.get(f"{name}_scale_inv")
        if scale is not None and scale.dim() == 2:
            rows, columns = (size // n for size, n in zip(tensor.shape, scale.shape, strict=True))
            scale = scale.float().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        made[name] = tensor if scale is None else (tensor.float() * scale).to(torch.bfloat16)
    return made


@pytest.fixture(scope="module")
def saved(two_layers, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fp8")
    return {
        "blocks": formats.rewrite(two_layers, folder / "blocks", in_blocks(64, 64), BLOCK),
        "tensor": formats.rewrite(two_layers, folder / "tensor", per_tensor, TENSOR),
    }


@pytest.fixture(scope="module")
def comparison(own_engine, two_layers, saved):
    return formats.run(own_engine, two_layers, ["bf16", *(f"fp8@{folder}" for folder in saved.values())])


@pytest.fixture(scope="module")
def columns(comparison, saved):
    return {
        kind: next(c for c in comparison.cells if str(folder) in c.variant) for kind, folder in saved.items()
    }


@pytest.mark.parametrize("kind", ["blocks", "tensor"])
def test_tokens_and_weights_are_those_of_plain_transformers(columns, saved, two_layers, kind):
    import torch
    from transformers import AutoModelForCausalLM

    column = columns[kind]
    assert column.status == "ok", column.error
    plain = AutoModelForCausalLM.from_pretrained(saved[kind], dtype=torch.bfloat16, device_map="cpu").eval()
    assert formats.generated(plain, saved[kind]) == column.token_ids
    meant, variant = unpacked(saved[kind]), resolve(f"fp8@{saved[kind]}")
    loaded = FP8.load(open_checkpoint(str(two_layers)), variant, CPU, lambda *_: None)
    ours, theirs = dict(loaded.model.named_parameters()), dict(plain.named_parameters())
    assert ours.keys() == theirs.keys() == meant.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]) and torch.equal(weight, meant[name]), name


@pytest.mark.parametrize("kind", ["blocks", "tensor"])
def test_rows_and_bytes_are_those_of_what_is_resident(columns, comparison, saved, two_layers, kind):
    column, meant = columns[kind], unpacked(saved[kind])
    rows = {r.name: r for r in column.layers}
    for name, weight in meant.items():
        row = rows[name]
        assert (row.logical_dtype, row.shape, row.bytes) == ("bf16", tuple(weight.shape), weight.nbytes)
        assert row.bits_per_weight == 16 and row.quant_state_bytes == 0
    held = sum(t.nbytes for t in meant.values())
    assert column.memory.weight_bytes == held and column.memory.quant_state_bytes == 0
    opened = open_checkpoint(str(two_layers))
    assert FP8.needed_bytes(resolve(column.variant), opened) == pytest.approx(held, rel=0.001)
    on_disk = sum(t.bytes for t in open_checkpoint(str(saved[kind])).tensors)
    note = next(n for n in column.notes if n.startswith("FP8 on disk, bf16 here"))
    assert megabytes(on_disk) in note and megabytes(held) in note and on_disk < held
    assert column.kernel == "torch Linear, unpacked from FP8"


def test_the_copied_code_gives_the_same_tokens(columns, comparison):
    copied: dict = {}
    exec(snippet(columns["blocks"], comparison), copied)
    assert tuple(copied["new_tokens"]) == columns["blocks"].token_ids


def test_experts_are_merged_and_unpacked(tmp_path):
    """Each expert is a weight of its own on disk, and one parameter per layer in the model."""
    import torch

    tiny_models.save(tmp_path / "plain", "mixtral", dtype="bfloat16")
    pack = in_blocks(32, 32)
    folder = formats.rewrite(
        tmp_path / "plain", tmp_path / "fp8",
        lambda name, t: pack(name.replace(".weight", "_proj.weight"), t) and
        {k.replace("_proj.weight", ".weight"): v for k, v in pack(name.replace(".weight", "_proj.weight"), t).items()}
        if ".experts." in name else None,
        {**BLOCK, "weight_block_size": [32, 32]},
    )  # fmt: skip
    checkpoint = open_checkpoint(str(tmp_path / "plain"))
    variant = FP8.complete(resolve(f"fp8@{folder}"), checkpoint)
    model = FP8.load(checkpoint, variant, CPU, lambda *_: None).model
    meant = unpacked(folder)
    first = [meant[n] for n in sorted(meant) if ".layers.0." in n and ".experts.0.w" in n]
    experts = model.model.layers[0].mlp.experts
    assert torch.equal(experts.gate_up_proj[0], torch.cat([first[0], first[2]]))
    assert torch.equal(experts.down_proj[0], first[1])
    held = sum(p.nbytes for p in model.parameters())
    assert FP8.needed_bytes(variant, checkpoint) == pytest.approx(held, rel=0.03)


def test_scales_that_are_powers_of_two(tmp_path):
    """One byte per scale (scale_fmt ue8m0)."""
    import torch

    def pack(name, weight):
        made = in_blocks(32, 32)(name, weight)
        if made is None:
            return None
        scale = made[f"{name}_scale_inv"].log2().ceil().exp2()
        blocks = scale.repeat_interleave(32, 0).repeat_interleave(32, 1)
        codes = (weight.float() / blocks).to(torch.float8_e4m3fn)
        return {name: codes, f"{name}_scale_inv": scale.to(torch.float8_e8m0fnu)}

    tiny_models.save(tmp_path / "plain", hidden_size=64, intermediate_size=128, dtype="bfloat16")
    config = {**BLOCK, "weight_block_size": [32, 32], "scale_fmt": "ue8m0"}
    folder = formats.rewrite(tmp_path / "plain", tmp_path / "fp8", pack, config)
    checkpoint = open_checkpoint(str(tmp_path / "plain"))
    variant = FP8.complete(resolve(f"fp8@{folder}"), checkpoint)
    model = FP8.load(checkpoint, variant, CPU, lambda *_: None).model
    for name, weight in unpacked(folder).items():
        assert torch.equal(model.get_parameter(name), weight), name
    assert FP8.needed_bytes(variant, checkpoint) == sum(p.nbytes for p in model.parameters())


# ---------------------------------------------------------------- adapters and training


def test_an_adapter_works(own_engine, two_layers, saved, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.bfloat16)
    lora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    for merged in ("", ":merged"):
        made = formats.run(own_engine, two_layers, [f"fp8@{saved['blocks']}"], f"{tmp_path / 'lora'}{merged}")
        (cell,) = made.cells
        assert cell.status == "ok", cell.error
        plain = AutoModelForCausalLM.from_pretrained(saved["blocks"], dtype=torch.bfloat16, device_map="cpu")
        from peft import PeftModel

        wanted = PeftModel.from_pretrained(plain, tmp_path / "lora", torch_device="cpu").eval()
        wanted = wanted.merge_and_unload() if merged else wanted
        assert cell.token_ids == formats.generated(wanted, saved["blocks"])


def test_it_is_trained_on_as_full_precision(saved, two_layers):
    import torch
    from peft import LoraConfig, get_peft_model

    checkpoint, variant = open_checkpoint(str(two_layers)), resolve(f"fp8@{saved['blocks']}")
    training = FP8.training(variant, "cpu")
    assert (training.dtype, training.quantized, training.activation_width) == ("bf16", False, 2)
    base = base_model.load(checkpoint, variant, "cpu", False, lambda *a: None)
    assert FP8.training_bytes(variant, checkpoint) == sum(p.nbytes for p in base.model.parameters())
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj"]))
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients)


# ---------------------------------------------------------------- weights that stay packed, as on a GPU that reads FP8


@pytest.fixture(scope="module")
def packed(own_engine, two_layers, saved):
    made = formats.run(own_engine, two_layers, [f"fp8@{folder}:kernel=packed" for folder in saved.values()])
    return dict(zip(saved, made.cells, strict=True))


@pytest.mark.parametrize("kind", ["blocks", "tensor"])
def test_packed_weights_give_the_tokens_of_unpacked_ones(packed, columns, saved, kind):
    column = packed[kind]
    assert column.status == "ok", column.error
    assert column.token_ids == columns[kind].token_ids, "a scale is on the wrong block"
    assert column.kernel == "torch Linear, FP8 unpacked to bf16 before each matmul"
    stored = open_checkpoint(str(saved[kind])).tensors
    rows = {r.name: r for r in column.layers}
    for tensor in (t for t in stored if t.dtype == "fp8_e4m3"):
        row = rows[tensor.name]
        scales = next(t for t in stored if t.name == f"{tensor.name}_scale_inv")
        assert (row.logical_dtype, row.storage_dtype, row.bytes) == ("fp8", "float8_e4m3fn", tensor.bytes)
        assert (row.shape, row.quant_state_bytes) == (tensor.shape, scales.bytes)
    held = sum(t.bytes for t in stored if not t.name.endswith("activation_scale"))
    assert column.memory.weight_bytes + column.memory.quant_state_bytes == held


def test_layers_of_packed_weights_are_read_as_stored(saved, two_layers):
    import torch

    from comparator.backends import row_matmul

    variant = resolve(f"fp8@{saved['blocks']}:kernel=packed")
    model = FP8.load(open_checkpoint(str(two_layers)), variant, CPU, lambda *_: None).model
    layers = [m for m in model.modules() if FP8.owns(m)]
    assert len(layers) == 14
    for layer in layers:
        forward, x = FP8.capture_forward(layer), torch.randn(1, 1, layer.in_features, dtype=torch.bfloat16)
        assert FP8.capture_note(layer) == row_matmul.NOTE
        wanted = x.double() @ FP8.dequantize(layer).double().t()
        apart = float((forward(x).double() - wanted).norm() / wanted.norm())
        assert apart < 0.005, f"{apart:.1%} from the unpacked weight: scales of another block"


def test_an_adapter_on_packed_weights(own_engine, two_layers, saved, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.bfloat16)
    lora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    variants = [f"fp8@{saved['blocks']}:kernel={kernel}" for kernel in ("packed", "unpack")]
    one, other = formats.run(own_engine, two_layers, variants, str(tmp_path / "lora")).cells
    assert one.status == "ok", one.error
    assert one.token_ids == other.token_ids
    (merged,) = formats.run(own_engine, two_layers, variants[:1], f"{tmp_path / 'lora'}:merged").cells
    assert merged.status == "failed" and "kernel=unpack" in merged.error.advice


def test_it_is_trained_on_unpacked(saved):
    ((variant, notes),) = FP8.training_variants(resolve(f"fp8@{saved['blocks']}:kernel=packed"), "cpu")
    assert "kernel=unpack" in variant.notation and notes


def test_experts_do_not_stay_packed(tmp_path):
    tiny_models.save(tmp_path / "plain", "mixtral", dtype="bfloat16")
    pack = in_blocks(32, 32)

    def experts(name, tensor):
        if ".experts." not in name:
            return None
        return {
            k.replace("_proj.weight", ".weight"): v
            for k, v in pack(name.replace(".weight", "_proj.weight"), tensor).items()
        }

    folder = formats.rewrite(
        tmp_path / "plain", tmp_path / "fp8", experts, {**BLOCK, "weight_block_size": [32, 32]}
    )
    said = formats.refused(f"fp8@{folder}:kernel=packed", tmp_path / "plain")
    assert "experts" in said and "kernel=" in said


# ---------------------------------------------------------------- refused before loading


def changed(saved, tmp_path, pack=lambda name, tensor: None, **quantization) -> str:
    return f"fp8@{formats.rewrite(saved['blocks'], tmp_path / 'changed', pack, quantization)}"


def test_without_a_source(two_layers):
    said = formats.refused("fp8", two_layers)
    assert "fp8@user/repo" in said


def test_other_sources_are_refused_by_name(two_layers, saved, tmp_path):
    assert "not quantized" in formats.refused(f"fp8@{two_layers}", two_layers)
    other = shutil.copytree(saved["blocks"], tmp_path / "ao")
    config = json.loads((other / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fbgemm_fp8"}
    (other / "config.json").write_text(json.dumps(config))
    assert "fbgemm_fp8, not fp8" in formats.refused(f"fp8@{other}", two_layers)
    tiny_models.save(tmp_path / "tiny", hidden_size=64, intermediate_size=128, dtype="bfloat16")
    small = formats.rewrite(
        tmp_path / "tiny", tmp_path / "small", in_blocks(32, 32), {**BLOCK, "weight_block_size": [32, 32]}
    )
    said = formats.refused(f"fp8@{small}", two_layers)
    assert "hidden_size 64" in said and "576" in said


def test_blocks_that_do_not_divide_a_weight(saved, two_layers, tmp_path):
    """192 rows in blocks of 128 have two scales; divided evenly, the second would start at row 96."""
    import torch

    def coarse(name, tensor):
        if not name.endswith("_scale_inv"):
            return None
        rows, columns = (-(-size * 64 // 128) for size in tensor.shape)
        return {name: torch.ones(rows, columns)}

    said = formats.refused(changed(saved, tmp_path, coarse, weight_block_size=[128, 128]), two_layers)
    assert "128×128" in said and "_proj.weight" in said and "wrong scales" in said


K = "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    ("pack", "quantization", "words"),
    [
        (lambda n, t: {} if n == f"{K}_scale_inv" else None, {}, [K, "no matching weight_scale_inv"]),
        (lambda n, t: {n.replace("_scale_inv", "_scale"): t} if n == f"{K}_scale_inv" else None, {},
         [K, "only a weight_scale"]),
        (lambda n, t: {n: t.bfloat16()} if n == K else None, {}, [K, "not FP8"]),
        (lambda n, t: {n: t[:1]} if n == f"{K}_scale_inv" else None, {}, [K, "(1, 9)", "(3, 9)"]),
        (lambda n, t: None, {"weight_block_size": None}, ["one scale per tensor"]),
        (lambda n, t: None, {"weight_block_size": [64]}, ["weight_block_size", "[64]"]),
        (lambda n, t: None, {"expert_dtype": "fp4"}, ["fp4"]),
        (lambda n, t: {} if n == K else None, {}, [K]),
    ],
)  # fmt: skip
def test_what_would_load_as_something_else_is_refused(saved, two_layers, tmp_path, pack, quantization, words):
    said = formats.refused(changed(saved, tmp_path, pack, **quantization), two_layers)
    assert all(word in said for word in words), said


def test_a_gpu_without_bf16(saved, two_layers, monkeypatch):
    from comparator.backends import dtypes

    monkeypatch.setattr(dtypes, "supports_bf16", lambda device: False)
    with pytest.raises(UserError, match="no bf16") as caught:
        FP8.load(open_checkpoint(str(two_layers)), resolve(f"fp8@{saved['blocks']}"), CPU, lambda *_: None)
    assert "fp16" in caught.value.advice
