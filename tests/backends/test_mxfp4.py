"""MXFP4 checkpoints of gpt-oss, `mxfp4@SOURCE`: a small random model whose experts are rounded to MXFP4 here, against plain
transformers and against the scales times the stored numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import stored_formats as formats
import tiny_models

from comparator.backends import backend_for, resolve, unquantized_experts
from comparator.backends.base import Placement
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint
from comparator.training import base_model
from comparator.util.formatting import megabytes

MX = backend_for(resolve("mxfp4"))
CPU = Placement("cpu")
CONFIG = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
                                                              "model.embed_tokens", "lm_head"]}  # fmt: skip
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def pack(name, weight):
    """(experts, inputs, outputs) → blocks (experts, outputs, inputs ÷ 32, 16), two values per byte, the first in the low
    half; scales: exponents of two with an offset of 127."""
    import torch

    if not name.endswith(EXPERTS):
        return None
    rows = weight.float().transpose(1, 2)
    blocks = rows.reshape(*rows.shape[:2], -1, 32)
    exponent = (
        blocks.abs().amax(-1).clamp_min(1e-30).log2().floor() - 2
    )  # the largest value has the exponent 2
    index = ((blocks / exponent.exp2()[..., None]).abs()[..., None] - torch.tensor(VALUES)).abs().argmin(-1)
    codes = (index + 8 * (blocks < 0)).to(torch.uint8)
    return {
        f"{name}_blocks": codes[..., 0::2] | (codes[..., 1::2] << 4),
        f"{name}_scales": (exponent + 127).to(torch.uint8),
    }


def unpacked(folder: Path) -> dict:
    """The weights in bf16, from the files alone."""
    import torch
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    made = {n: t for n, t in stored.items() if not n.endswith(("_blocks", "_scales"))}
    values = torch.tensor([*VALUES, *(-v for v in VALUES)])
    for name, blocks in stored.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            pairs = torch.stack([values[(blocks & 15).long()], values[(blocks >> 4).long()]], -1)
            scale = (stored[f"{stem}_scales"].float() - 127).exp2()
            rows = (pairs.flatten(-2) * scale[..., None]).flatten(-2)
            made[stem] = rows.transpose(1, 2).bfloat16()
    return made


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """(full precision, MXFP4)"""
    folder = tmp_path_factory.mktemp("mxfp4")
    tiny_models.save(folder / "plain", "gpt_oss", dtype="bfloat16")
    return folder / "plain", formats.rewrite(folder / "plain", folder / "mxfp4", pack, CONFIG)


@pytest.fixture(scope="module")
def comparison(own_engine, models):
    return formats.run(own_engine, models[0], ["bf16", f"mxfp4@{models[1]}"])


@pytest.fixture(scope="module")
def column(comparison):
    return comparison.cells[-1]


def test_tokens_and_weights_are_those_of_plain_transformers(column, models):
    import torch
    from transformers import AutoModelForCausalLM

    plain, folder = models
    assert column.status == "ok", column.error
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu").eval()
    assert formats.generated(wanted, folder) == column.token_ids
    loaded = MX.load(open_checkpoint(str(plain)), resolve(column.variant), CPU, lambda *_: None)
    ours, theirs, meant = (
        dict(loaded.model.named_parameters()),
        dict(wanted.named_parameters()),
        unpacked(folder),
    )
    assert ours.keys() == theirs.keys() == meant.keys()
    for name, weight in ours.items():
        assert torch.equal(weight, theirs[name]) and torch.equal(weight, meant[name]), name


def test_rows_and_bytes_are_those_of_what_is_resident(column, models):
    plain, folder = models
    rows, meant = {r.name: r for r in column.layers}, unpacked(folder)
    for name, weight in meant.items():
        row = rows[name]
        assert (row.logical_dtype, row.shape, row.bytes) == ("bf16", tuple(weight.shape), weight.nbytes)
    held = sum(t.nbytes for t in meant.values())
    assert column.memory.weight_bytes == held and column.memory.quant_state_bytes == 0
    assert MX.needed_bytes(resolve(column.variant), open_checkpoint(str(plain))) == held
    on_disk = sum(t.bytes for t in open_checkpoint(str(folder)).tensors)
    note = next(n for n in column.notes if n.startswith("MXFP4 on disk, bf16 here"))
    assert megabytes(on_disk) in note and megabytes(held) in note and on_disk < held
    assert column.kernel == "transformers experts, unpacked from MXFP4"
    assert unquantized_experts(resolve(column.variant), open_checkpoint(str(plain))) == ""


def test_the_copied_code_gives_the_same_tokens(comparison, column):
    copied: dict = {}
    exec(snippet(column, comparison), copied)
    assert tuple(copied["new_tokens"]) == column.token_ids


def test_an_adapter_works(own_engine, models, tmp_path):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(models[0], dtype=torch.bfloat16)
    lora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    (cell,) = formats.run(own_engine, models[0], [f"mxfp4@{models[1]}"], str(tmp_path)).cells
    assert cell.status == "ok", cell.error
    plain = AutoModelForCausalLM.from_pretrained(models[1], dtype=torch.bfloat16, device_map="cpu")
    wanted = PeftModel.from_pretrained(plain, tmp_path, torch_device="cpu").eval()
    assert cell.token_ids == formats.generated(wanted, models[1])


def test_it_is_trained_on_as_full_precision(models):
    import torch
    from peft import LoraConfig, get_peft_model

    checkpoint, variant = open_checkpoint(str(models[0])), resolve(f"mxfp4@{models[1]}")
    base = base_model.load(checkpoint, variant, "cpu", False, lambda *a: None)
    assert MX.training_bytes(variant, checkpoint) == sum(p.nbytes for p in base.model.parameters())
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj"]))
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients)


# ---------------------------------------------------------------- refused before loading


def test_other_sources_are_refused_by_name(models, tmp_path):
    plain, folder = models
    assert "mxfp4@user/repo" in formats.refused("mxfp4", plain)
    assert "not quantized" in formats.refused(f"mxfp4@{plain}", plain)
    assert "mxfp4, not fp8" in formats.refused(f"fp8@{folder}", plain)
    tiny_models.save(tmp_path / "llama", dtype="bfloat16")
    assert "GptOss" in formats.refused(f"mxfp4@{folder}", tmp_path / "llama")
    tiny_models.save(tmp_path / "other", "gpt_oss", dtype="bfloat16", num_key_value_heads=1)
    assert "num_key_value_heads" in formats.refused(f"mxfp4@{folder}", tmp_path / "other")


DOWN = "model.layers.1.mlp.experts.down_proj"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda n, t: {} if n == f"{DOWN}_scales" else None, [f"{DOWN}_blocks", "no matching scales"]),
        (lambda n, t: {} if n == f"{DOWN}_blocks" else None, [f"{DOWN}_scales", "no matching blocks"]),
        (lambda n, t: {n: t[:, :, :1]} if n == f"{DOWN}_scales" else None, [f"{DOWN}_scales", "(4, 64, 1)", "(4, 64, 2)"]),
        (lambda n, t: {n: t.flatten(-2)} if n == f"{DOWN}_blocks" else None, [f"{DOWN}_blocks", "blocks of 32"]),
        (lambda n, t: {n.replace("down_proj", "o_proj"): t} if DOWN in n and "bias" not in n else None,
         ["o_proj_blocks", "gate_up_proj and down_proj"]),
    ],
)  # fmt: skip
def test_what_would_load_as_something_else_is_refused(models, tmp_path, change, words):
    folder = formats.rewrite(models[1], tmp_path / "changed", change)
    said = formats.refused(f"mxfp4@{folder}", models[0])
    assert all(word in said for word in words), said
