"""compressed-tensors checkpoints, `ct@SOURCE`: real weights, quantized and packed here by the format's description, against
plain transformers and against the stored numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import stored_formats as formats
import tiny_models
from ct_checkpoints import KINDS, Groups, arguments, quantization

from comparator.backends import backend_for, resolve
from comparator.backends.base import Placement
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint
from comparator.training import base_model
from comparator.util.formatting import megabytes

pytest.importorskip("compressed_tensors", reason="requirements-formats.txt is not installed")
CT = backend_for(resolve("ct"))
CPU = Placement("cpu")


REAL = ("w4", "int8")
PACKED = ("w4", "asym")
DYNAMIC = "compressed-tensors copies a number from the CPU each time it rounds activations"
ROUNDING = ("int8", "fp8", "static", "w4a4")


def plainly_loaded(folder: Path, dequantize: bool = False):
    """As transformers loads it by its config alone; packed zero points it loads unpacked only."""
    import torch
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    more = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **more).eval()


@pytest.fixture(scope="module")
def model_of(two_layers, tmp_path_factory):
    """The model of a kind: real weights for two of them, a random small model for the others."""
    tiny = tmp_path_factory.mktemp("ct") / "tiny"
    tiny_models.save(tiny, hidden_size=64, intermediate_size=128, dtype="bfloat16")
    return lambda kind: two_layers if kind in REAL else tiny


@pytest.fixture(scope="module")
def saved(model_of, tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("ct")
    return {
        k: formats.rewrite(model_of(k), folder / k, pack, config) for k, (pack, config, _) in KINDS.items()
    }


def unpacked(folder: Path, kind: str) -> str:
    return f"ct@{folder}" + (":kernel=unpack" if kind in PACKED else "")


@pytest.fixture(scope="module")
def comparison(own_engine, two_layers, saved):
    """The real weights unpacked, and W4A16 packed, as it is by default."""
    return formats.run(own_engine, two_layers, [*(unpacked(saved[k], k) for k in REAL), f"ct@{saved['w4']}"])


@pytest.fixture(scope="module")
def columns(own_engine, comparison, model_of, saved):
    others = [k for k in KINDS if k not in REAL]
    small = formats.run(own_engine, model_of(others[0]), [unpacked(saved[k], k) for k in others])
    return dict(zip((*REAL, "packed", *others), (*comparison.cells, *small.cells), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_weights_are_those_of_plain_transformers(columns, saved, model_of, kind):
    import torch

    column, meant = columns[kind], KINDS[kind][0].meant
    assert column.status == "ok", column.error
    plain = plainly_loaded(saved[kind], dequantize=kind == "asym")
    assert formats.generated(plain, saved[kind]) == column.token_ids
    model = CT.load(open_checkpoint(str(model_of(kind))), resolve(column.variant), CPU, lambda *_: None).model
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert {
        n for n in ours if not n.endswith(("input_scale", "input_zero_point", "input_global_scale"))
    } == meant.keys()
    for name, weight in meant.items():
        assert torch.equal(ours[name], theirs[name]), name
        assert torch.allclose(ours[name].float(), weight.float(), rtol=2**-7, atol=1e-6), name
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        given, wanted = model(ids).logits, plain(ids).logits
        CT.prepare_for_training(model)
        unrounded = model(ids).logits
    refusals = {CT.graph_refusal(m) for m in model.modules() if CT.owns(m)}
    assert refusals == {"int8": {DYNAMIC}, "fp8": {DYNAMIC}, "static": {None}, "w4a4": {DYNAMIC}}.get(
        kind, set()
    )
    assert torch.equal(given, wanted)
    assert torch.equal(given, unrounded) == (kind not in ROUNDING), (
        "activations are rounded where the config says so"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_bytes_are_those_of_what_is_resident(columns, saved, model_of, kind):
    column, (pack, _, stored) = columns[kind], KINDS[kind]
    rows = {r.name: r for r in column.layers}
    for name, weight in pack.meant.items():
        assert (rows[name].logical_dtype, rows[name].shape) == ("bf16", tuple(weight.shape))
        assert rows[name].bytes == weight.nbytes and rows[name].bits_per_weight == 16
    held = sum(r.bytes + r.quant_state_bytes for r in column.layers)
    small = sum(r.bytes for r in column.layers if r.name not in pack.meant)
    assert held == sum(t.nbytes for t in pack.meant.values()) + small and small < 500
    assert CT.needed_bytes(resolve(column.variant), open_checkpoint(str(model_of(kind)))) == pytest.approx(
        held, rel=0.001
    )
    on_disk = sum(t.bytes for t in open_checkpoint(str(saved[kind])).tensors)
    note = next(n for n in column.notes if n.startswith(f"{stored} on disk, bf16 here"))
    assert megabytes(on_disk) in note and megabytes(sum(t.nbytes for t in pack.meant.values())) in note
    assert any("Activations are rounded" in n for n in column.notes) == (kind in ROUNDING)
    layer = "compressed-tensors" if kind in ROUNDING else "torch"
    assert column.kernel == f"{layer} Linear, unpacked from {stored}"


@pytest.mark.parametrize("kind", ["w4", "int8"])
def test_the_copied_code_gives_the_same_tokens(columns, comparison, kind):
    copied: dict = {}
    exec(snippet(columns[kind], comparison), copied)
    assert tuple(copied["new_tokens"]) == columns[kind].token_ids


# ---------------------------------------------------------------- W4A16 that stays packed


def held_in(model) -> int:
    return sum(
        t.nbytes for t in (*model.parameters(), *model.buffers()) if t.dtype.itemsize < 4 or t.dim() > 1
    )


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_those_of_the_unpacked_ones(saved, model_of, kind):
    """The same numbers: with zero points, after the offset's rounding to bf16."""
    import torch

    checkpoint = open_checkpoint(str(model_of(kind)))
    variant = CT.complete(resolve(f"ct@{saved[kind]}:kernel=int4pack"), checkpoint)
    loaded = CT.load(checkpoint, variant, CPU, lambda *_: None)
    assert loaded.kernel == "torch int4pack"
    layers = {n: m for n, m in loaded.model.named_modules() if CT.owns(m)}
    meant = KINDS[kind][0].meant
    assert {f"{n}.weight" for n in layers} == {n for n in meant if formats.is_linear(n)}
    for name, layer in layers.items():
        wanted = meant[f"{name}.weight"].float()
        step = layer.scales_and_zeros[..., 0].float().max()
        limit = 0 if kind == "w4" else float(15 * step * 2**-8)
        assert (CT.dequantize(layer) - wanted).abs().max() <= limit, name
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        exact = x.float() @ CT.dequantize(layer).T
        assert torch.allclose(layer(x).float(), exact, rtol=2**-7, atol=2**-7 * float(exact.abs().max())), (
            name
        )
    assert CT.needed_bytes(variant, checkpoint) == pytest.approx(held_in(loaded.model), rel=0.001)


def test_a_packed_column(columns, comparison, saved):
    """The same answer as unpacked in a third of the layers' memory; rows and notes say 4 bits."""
    packed, plain = columns["packed"], columns["w4"]
    assert packed.status == "ok", packed.error
    assert packed.token_ids == plain.token_ids, "the same numbers, multiplied by another kernel"
    assert packed.kernel == "torch int4pack" and not any("on disk" in n for n in packed.notes)
    rows = [r for r in packed.layers if r.logical_dtype == "int4 (ct)"]
    meant = KINDS["w4"][0].meant
    assert {r.name for r in rows} == {n for n in meant if formats.is_linear(n)}
    for row in rows:
        outputs, inputs = meant[row.name].shape
        assert row.shape == (outputs, inputs)
        assert (row.bytes, row.quant_state_bytes) == (outputs * inputs // 2, 4 * outputs * inputs // 64)
    copied: dict = {}
    exec(snippet(packed, comparison), copied)
    assert tuple(copied["new_tokens"]) == packed.token_ids


def test_what_cannot_stay_packed_says_why(saved, model_of):
    said = formats.refused(f"ct@{saved['int8']}:kernel=int4pack", model_of("int8"))
    assert "activations are rounded" in said and "kernel=" in said
    said = formats.refused(f"ct@{saved['nvfp4']}:kernel=int4pack", model_of("nvfp4"))
    assert "NVFP4" in said


def test_groups_of_several_bits(tmp_path):
    """Each layer by the group whose targets name it."""
    import torch

    tiny_models.save(tmp_path / "plain", hidden_size=64, intermediate_size=128, dtype="bfloat16")
    four, eight = Groups(4), Groups(8)
    config = quantization("pack-quantized", arguments(4, "int", "group", 64))
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*down_proj$"], "weights": arguments(8, "int", "group", 64)
    }  # fmt: skip
    config["config_groups"]["group_0"]["targets"] = ["re:.*(self_attn|gate|up).*"]
    folder = formats.rewrite(
        tmp_path / "plain",
        tmp_path / "mixed",
        lambda n, t: (eight if "down_proj" in n else four)(n, t),
        config,
    )
    checkpoint = open_checkpoint(str(tmp_path / "plain"))
    variant = CT.complete(resolve(f"ct@{folder}"), checkpoint)
    loaded = CT.load(checkpoint, variant, CPU, lambda *_: None)
    assert loaded.kernel.endswith("W4A16 + W8A16")
    assert CT.needed_bytes(variant, checkpoint) == sum(p.nbytes for p in loaded.model.parameters())
    plain = plainly_loaded(folder)
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, plain(ids).logits)


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ct") / "experts"
    tiny_models.save(folder, "mixtral", hidden_size=64, intermediate_size=128, dtype="bfloat16")
    return folder


def with_experts(source: Path, target: Path, kind: str, monkeypatch) -> tuple[Path, dict]:
    """(the checkpoint with quantized experts, what its numbers mean)"""
    linear = formats.is_linear
    monkeypatch.setattr(formats, "is_linear", lambda n: linear(n) or ".experts." in n)
    pack, config, _ = KINDS[kind]
    pack = type(pack)(**{k: v for k, v in vars(pack).items() if k != "meant"})
    config = {**config, "ignore": ["lm_head", "re:.*gate$"]}
    return formats.rewrite(source, target, pack, config), pack.meant


@pytest.mark.parametrize("kind", ["w4", "fp8"])
def test_experts_are_unpacked_and_merged(experts, tmp_path, kind, monkeypatch):
    """Each expert is a weight of its own on disk, and one parameter per layer in the model."""
    import torch

    folder, meant = with_experts(experts, tmp_path / kind, kind, monkeypatch)
    checkpoint = open_checkpoint(str(experts))
    variant = CT.complete(resolve(f"ct@{folder}"), checkpoint)
    loaded = CT.load(checkpoint, variant, CPU, lambda *_: None)
    assert any("except before experts" in n for n in loaded.notes) == (kind == "fp8")
    for number, layer in enumerate(loaded.model.model.layers):
        for expert in range(4):
            w1, w2, w3 = (
                next(
                    t
                    for n, t in meant.items()
                    if f"layers.{number}." in n and n.endswith(f".experts.{expert}.{w}.weight")
                )
                for w in ("w1", "w2", "w3")
            )
            assert torch.equal(layer.mlp.experts.gate_up_proj[expert], torch.cat([w1, w3]))
            assert torch.equal(layer.mlp.experts.down_proj[expert], w2)
    held = sum(p.nbytes for p in loaded.model.parameters())
    assert CT.needed_bytes(variant, checkpoint) == held
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        assert torch.equal(loaded.model(ids).logits, plainly_loaded(folder)(ids).logits)


@pytest.mark.parametrize("kind", ["asym", "int8", "nvfp4"])
def test_experts_that_transformers_would_not_unpack_are_refused(experts, tmp_path, kind, monkeypatch):
    folder, _ = with_experts(experts, tmp_path / kind, kind, monkeypatch)
    said = formats.refused(f"ct@{folder}", experts)
    assert "experts.0.w1" in said and KINDS[kind][2] in said


# ---------------------------------------------------------------- adapters and training


@pytest.fixture(scope="module")
def lora(two_layers, tmp_path_factory) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.bfloat16)
    made = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("ct") / "lora"
    made.save_pretrained(folder)
    return folder


def test_an_adapter_works(own_engine, two_layers, saved, lora):
    from peft import PeftModel

    variants = [unpacked(saved["w4"], "w4"), f"ct@{saved['int8']}", f"ct@{saved['w4']}"]
    made = formats.run(own_engine, two_layers, variants, str(lora))
    for kind, cell in zip(("w4", "int8", "w4"), made.cells, strict=True):
        assert cell.status == "ok", cell.error
        plain = plainly_loaded(saved[kind])
        formats.generated(plain, saved[kind])  # its first forward pass unpacks it
        wanted = PeftModel.from_pretrained(plain, lora, torch_device="cpu").eval()
        assert cell.token_ids == formats.generated(wanted, saved[kind])
    (merged,) = formats.run(own_engine, two_layers, [f"ct@{saved['int8']}"], f"{lora}:merged").cells
    assert merged.status == "ok", merged.error
    (refused,) = formats.run(own_engine, two_layers, [f"ct@{saved['w4']}"], f"{lora}:merged").cells
    assert "kernel=unpack" in refused.error.advice, "a packed weight cannot take a merged update"


@pytest.mark.parametrize("kind", ["w4", "int8"])
def test_it_is_trained_on_without_the_rounding_of_activations(saved, two_layers, kind):
    import torch
    from peft import LoraConfig, get_peft_model

    checkpoint, variant = open_checkpoint(str(two_layers)), resolve(f"ct@{saved[kind]}")
    ((variant, notes),) = CT.training_variants(variant, "cpu")
    base = base_model.load(checkpoint, variant, "cpu", False, lambda *a: None)
    assert "no gradients" in notes[0]
    assert CT.training_bytes(variant, checkpoint) == sum(p.nbytes for p in base.model.parameters())
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj"]))
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if "lora_B" in n}
    assert len(gradients) == 2 and all(g is not None and g.abs().sum() > 0 for g in gradients.values())


# ---------------------------------------------------------------- refused before loading


def test_other_sources_are_refused_by_name(two_layers, saved, tmp_path):
    assert "ct@user/repo" in formats.refused("ct", two_layers)
    assert "not quantized" in formats.refused(f"ct@{two_layers}", two_layers)
    said = formats.refused(f"fp8@{saved['fp8']}", two_layers)
    assert "compressed-tensors, not fp8" in said and "ct@" in said
    tiny_models.save(tmp_path / "tiny", hidden_size=64, intermediate_size=128, dtype="bfloat16")
    small = formats.rewrite(tmp_path / "tiny", tmp_path / "small", Groups(), KINDS["w4"][1])
    said = formats.refused(f"ct@{small}", two_layers)
    assert "hidden_size 64" in said and "576" in said


K = "model.layers.1.self_attn.k_proj"


@pytest.mark.parametrize(
    ("pack", "config", "said"),
    [
        (None, {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparse weights"]),
        (None, {"transform_config": {"config_groups": {"R1": {}}}}, ["rotated weights"]),
        (None, {"kv_cache_scheme": {"num_bits": 8}}, ["KV cache"]),
        (None, {"quantization_status": "frozen"}, ["frozen"]),
        (None, {"format": "marlin-24"}, ["marlin-24", "pack-quantized"]),
        (None, {"config_groups": None}, ["config_groups"]),
        (lambda n, t: {} if n == f"{K}.weight_scale" else None, {}, [K, "weight_scale"]),
        (lambda n, t: {} if n == f"{K}.weight_shape" else None, {}, [K, "weight_shape"]),
        (lambda n, t: {} if n == f"{K}.weight_packed" else None, {}, [K, "not quantized"]),
        (lambda n, t: {n: t, f"{K}.weight_g_idx": t.clone()} if n == f"{K}.weight_shape" else None, {}, ["actorder"]),
    ],
)  # fmt: skip
def test_what_would_load_as_something_else_is_refused(saved, two_layers, tmp_path, pack, config, said):
    folder = formats.rewrite(saved["w4"], tmp_path / "changed", pack or (lambda n, t: None), config)
    given = formats.refused(f"ct@{folder}", two_layers)
    assert all(word in given for word in said), given


def test_without_the_package(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "compressed_tensors" else find(name)
    )
    assert CT.unavailable() == "compressed_tensors is not installed: pip install -r requirements-formats.txt"
    assert (Path(__file__).parents[2] / "requirements-formats.txt").is_file()
