"""compressed-tensors checkpoints, `ct@SOURCE`: real weights, quantized and packed here by the format's description, against
plain transformers and against the stored numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import stored_formats as formats
import tiny_models

from comparator.backends import backend_for, resolve
from comparator.backends.base import Placement
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint
from comparator.training import base_model
from comparator.util.formatting import megabytes

pytest.importorskip("compressed_tensors", reason="requirements-formats.txt is not installed")
CT = backend_for(resolve("ct"))
CPU = Placement("cpu")


def arguments(bits: int, kind: str, strategy: str, group=None, dynamic=False, symmetric=True) -> dict:
    return {"num_bits": bits, "type": kind, "strategy": strategy, "group_size": group, "dynamic": dynamic,
            "symmetric": symmetric}  # fmt: skip


def quantization(how: str, weights: dict, inputs: dict | None = None, targets=("Linear",)) -> dict:
    group = {"targets": list(targets), "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "format": how, "quantization_status": "compressed",
            "ignore": ["lm_head"], "config_groups": {"group_0": group}}  # fmt: skip


def words(codes, bits: int):
    """Codes (rows, columns) from 0 to 2^bits - 1 → int32, one after the other from the lowest bit of each word on."""
    import numpy as np
    import torch

    flat = codes.numpy().astype(np.uint8)
    one_by_one = np.unpackbits(flat[..., None], axis=-1, bitorder="little")[..., :bits].reshape(len(flat), -1)
    padded = np.pad(one_by_one, ((0, 0), (0, -one_by_one.shape[1] % 32)))
    return torch.from_numpy(np.packbits(padded, axis=-1, bitorder="little").view(np.int32).copy())


class Packer:
    """Packs linear layers, and keeps what the stored numbers mean: `meant`, in bf16."""

    def __init__(self):
        self.meant: dict = {}

    def __call__(self, name, weight):
        if not formats.is_linear(name):
            self.meant[name] = weight
            return None
        stored, self.meant[name] = self.layer(weight.float(), name.removesuffix("weight"))
        return stored


class Groups(Packer):
    """Integers in groups of 64, with or without zero points."""

    def __init__(self, bits=4, symmetric=True):
        super().__init__()
        self.bits, self.symmetric = bits, symmetric

    def layer(self, weight, stem):
        import torch

        outputs, inputs = weight.shape
        blocks, most = weight.reshape(outputs, inputs // 64, 64), 2**self.bits - 1
        low, high = blocks.amin(-1), blocks.amax(-1)
        half = 2 ** (self.bits - 1)
        scale = ((high - low) / most if not self.symmetric else blocks.abs().amax(-1) / (half - 1)).bfloat16()
        zero = (
            torch.full_like(scale, half) if self.symmetric else (-low / scale.float()).round().clamp(0, most)
        )
        codes = (blocks / scale.float()[..., None]).round() + zero.float()[..., None]
        codes = codes.clamp(0, most)
        meant = ((codes - zero.float()[..., None]).bfloat16() * scale[..., None]).reshape(outputs, inputs)
        stored = {
            f"{stem}weight_packed": words(codes.reshape(outputs, inputs).to(torch.uint8), self.bits),
            f"{stem}weight_scale": scale,
            f"{stem}weight_shape": torch.tensor([outputs, inputs]),
        }
        if not self.symmetric:
            stored[f"{stem}weight_zero_point"] = words(zero.to(torch.uint8).t().contiguous(), self.bits).t()
        return stored, meant


class Rows(Packer):
    """8 bits per weight, one scale per row; `static`: one scale for the inputs of a layer too."""

    def __init__(self, dtype: str, largest: int, static=False):
        super().__init__()
        self.dtype, self.largest, self.static = dtype, largest, static

    def layer(self, weight, stem):
        import torch

        scale = (weight.abs().amax(1, keepdim=True) / self.largest).bfloat16()
        codes = weight / scale.float()
        codes = (codes.round() if self.dtype == "int8" else codes).clamp(-self.largest, self.largest)
        codes = codes.to(getattr(torch, self.dtype))
        stored = {f"{stem}weight": codes, f"{stem}weight_scale": scale}
        if self.static:
            stored[f"{stem}input_scale"] = torch.tensor([0.05], dtype=torch.bfloat16)
        return stored, codes.bfloat16() * scale


class FourBitFloats(Packer):
    """NVFP4: E2M1 in groups of 16, an e4m3 scale per group and one fp32 scale per tensor."""

    VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

    def layer(self, weight, stem):
        import torch

        outputs, inputs = weight.shape
        blocks = weight.reshape(outputs, inputs // 16, 16)
        overall = (448 * 6 / weight.abs().max()).reshape(1)
        scale = (blocks.abs().amax(-1) / 6 * overall).to(torch.float8_e4m3fn)
        values = torch.tensor(self.VALUES)
        real = (scale.float() / overall)[..., None]
        index = ((blocks / real).abs()[..., None] - values).abs().argmin(-1)
        codes = (index + 8 * (blocks < 0)).to(torch.uint8).reshape(outputs, inputs)
        meant = (
            (values[index] * torch.where(blocks < 0, -1.0, 1.0) * real).reshape(outputs, inputs).bfloat16()
        )
        stored = {
            f"{stem}weight_packed": codes[:, 0::2] | (codes[:, 1::2] << 4),
            f"{stem}weight_scale": scale,
            f"{stem}weight_global_scale": overall,
        }
        return stored, meant


KINDS = {  # name → (how it is packed, quantization_config, the column's words)
    "w4": (Groups(), quantization("pack-quantized", arguments(4, "int", "group", 64)), "W4A16"),
    "asym": (Groups(symmetric=False), quantization("pack-quantized", arguments(4, "int", "group", 64, symmetric=False)),
             "W4A16"),
    "int8": (Rows("int8", 127), quantization("int-quantized", arguments(8, "int", "channel"),
                                             arguments(8, "int", "token", dynamic=True)), "W8A8"),
    "fp8": (Rows("float8_e4m3fn", 448), quantization("float-quantized", arguments(8, "float", "channel"),
                                                     arguments(8, "float", "token", dynamic=True)),
            "FP8 with FP8 activations"),
    "static": (Rows("float8_e4m3fn", 448, static=True),
               quantization("float-quantized", arguments(8, "float", "channel"), arguments(8, "float", "tensor")),
               "FP8 with FP8 activations"),
    "nvfp4": (FourBitFloats(), quantization("nvfp4-pack-quantized", arguments(4, "float", "tensor_group", 16)), "FP4"),
}  # fmt: skip
REAL = ("w4", "int8")
ROUNDING = ("int8", "fp8", "static")


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


@pytest.fixture(scope="module")
def comparison(own_engine, two_layers, saved):
    return formats.run(own_engine, two_layers, [f"ct@{saved[k]}" for k in REAL])


@pytest.fixture(scope="module")
def columns(own_engine, comparison, model_of, saved):
    others = [k for k in KINDS if k not in REAL]
    small = formats.run(own_engine, model_of(others[0]), [f"ct@{saved[k]}" for k in others])
    return dict(zip((*REAL, *others), (*comparison.cells, *small.cells), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_weights_are_those_of_plain_transformers(columns, saved, model_of, kind):
    import torch

    column, meant = columns[kind], KINDS[kind][0].meant
    assert column.status == "ok", column.error
    plain = plainly_loaded(saved[kind], dequantize=kind == "asym")
    assert formats.generated(plain, saved[kind]) == column.token_ids
    model = CT.load(open_checkpoint(str(model_of(kind))), resolve(column.variant), CPU, lambda *_: None).model
    ours, theirs = dict(model.named_parameters()), dict(plain.named_parameters())
    assert {n for n in ours if not n.endswith(("input_scale", "input_zero_point"))} == meant.keys()
    for name, weight in meant.items():
        assert torch.equal(ours[name], theirs[name]), name
        assert torch.allclose(ours[name].float(), weight.float(), rtol=2**-7, atol=1e-6), name
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.inference_mode():
        given, wanted = model(ids).logits, plain(ids).logits
        CT.prepare_for_training(model)
        unrounded = model(ids).logits
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

    made = formats.run(own_engine, two_layers, [f"ct@{saved['w4']}", f"ct@{saved['int8']}"], str(lora))
    for kind, cell in zip(("w4", "int8"), made.cells, strict=True):
        assert cell.status == "ok", cell.error
        plain = plainly_loaded(saved[kind])
        formats.generated(plain, saved[kind])  # its first forward pass unpacks it
        wanted = PeftModel.from_pretrained(plain, lora, torch_device="cpu").eval()
        assert cell.token_ids == formats.generated(wanted, saved[kind])
    (merged,) = formats.run(own_engine, two_layers, [f"ct@{saved['int8']}"], f"{lora}:merged").cells
    assert merged.status == "ok", merged.error


@pytest.mark.parametrize("kind", ["w4", "int8"])
def test_it_is_trained_on_without_the_rounding_of_activations(saved, two_layers, kind):
    import torch
    from peft import LoraConfig, get_peft_model

    checkpoint, variant = open_checkpoint(str(two_layers)), resolve(f"ct@{saved[kind]}")
    base = base_model.load(checkpoint, variant, "cpu", False, lambda *a: None)
    ((_, notes),) = CT.training_variants(variant, "cpu")
    assert any("no gradients" in n for n in notes) == (kind == "int8")
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
