"""HQQ, made on the spot and ready-made, against hqq's own layers in a small model."""

from __future__ import annotations

import copy
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import stored_formats as formats
import tiny_models

from comparator import api
from comparator.backends import backend_for, resolve
from comparator.backends.base import AdapterKind, Placement
from comparator.backends.hqq.layout import Layout
from comparator.comparison import runner
from comparator.core.errors import UserError
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint
from comparator.training import base_model

pytest.importorskip("hqq", reason="hqq is in requirements-formats.txt, which `make test` installs")
HQQ = backend_for(resolve("hqq"))
CPU = Placement("cpu")
KINDS = {"8bit": (8, 64), "4bit": (4, 64), "3bit,g32": (3, 32), "2bit,g16": (2, 16)}
Q = "model.layers.1.self_attn.q_proj"


@cache
def library_model(folder: Path, bits: int, group: int, axis: int = 1, view: bool = False):
    """What hqq itself makes of the model: its layers in place of all linear layers but the head. Not to be changed."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, layer in list(model.named_modules()):
        if type(layer) is torch.nn.Linear and name != "lm_head":
            config = BaseQuantizeConfig(nbits=bits, group_size=group, axis=axis, view_as_float=view)
            model.set_submodule(name, HQQLinear(layer, config, compute_dtype=torch.bfloat16, device="cpu"))
    return model.eval()


def save(
    folder: Path, target: Path, bits: int = 4, group: int = 64, axis: int = 1, view: bool = False
) -> Path:
    """A checkpoint as transformers 4 wrote it: hqq's own state dict, settings beside every weight."""
    state = library_model(folder, bits, group, axis, view).state_dict()
    state.pop("lm_head.weight")
    layers = {name.rpartition(".")[0] for name in state if name.endswith(".W_q")}

    def pack(name, tensor):
        module = name.removesuffix(".weight")
        if module not in layers:
            return None
        return {n: t.data for n, t in state.items() if n.rpartition(".")[0] == module}

    config = {"quant_method": "hqq", "skip_modules": ["lm_head"], "quant_config": {"weight_quant_params": {
        "nbits": bits, "group_size": group, "axis": axis}}}  # fmt: skip
    return formats.rewrite(folder, target, pack, config)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "model"
    tiny_models.save(folder, hidden_size=128, intermediate_size=256, dtype="bfloat16")
    return folder


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory) -> Path:
    return save(small, tmp_path_factory.mktemp("hqq") / "g64")


@pytest.fixture(scope="module")
def comparison(own_engine, small, saved):
    made = [f"hqq:{kind},kernel=unpack" for kind in KINDS]
    return formats.run(own_engine, small, ["bf16", *made, "hqq", f"hqq@{saved}:kernel=unpack"])


def column(comparison, variant: str):
    return next(c for c in comparison.cells if c.variant.startswith(variant))


def stored_bytes(model) -> int:
    """Of hqq's own layers: packed weights, scales, zero points, and whatever is not quantized."""
    total = sum(p.nbytes for p in model.parameters())
    return total + sum(
        m.meta[n].nbytes for m in model.modules() if hasattr(m, "W_q") for n in ("scale", "zero")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_and_bytes_are_those_of_the_library(comparison, small, kind):
    bits, group = KINDS[kind]
    cell = column(comparison, resolve(f"hqq:{kind},kernel=unpack").notation)
    assert cell.status == "ok", cell.error
    assert cell.kernel == "hqq, unpacked to the activations' dtype"
    library = library_model(small, bits, group)
    assert formats.generated(library, small) == cell.token_ids
    assert cell.memory.weight_bytes + cell.memory.quant_state_bytes == stored_bytes(library)
    assert HQQ.needed_bytes(resolve(cell.variant), open_checkpoint(str(small))) == stored_bytes(library)
    row = next(r for r in cell.layers if r.name.startswith(Q))
    assert (row.logical_dtype, row.shape) == (f"int{bits} (HQQ)", (128, 128))
    stored = {8: 8, 4: 4, 3: 3.2, 2: 2}[bits]  # ten 3-bit values lie in 32 bits
    assert row.bits_per_weight == pytest.approx(stored + 32 / group, rel=0.03)


def test_every_weight_is_the_library_s(small):
    import torch

    checkpoint = open_checkpoint(str(small))
    for kind, (bits, group) in KINDS.items():
        ours = HQQ.load(checkpoint, resolve(f"hqq:{kind},kernel=unpack"), CPU, lambda *_: None).model
        theirs = library_model(small, bits, group)
        for name, module in ours.named_modules():
            if HQQ.owns(module):
                wanted = theirs.get_submodule(name).dequantize().float()
                assert torch.equal(HQQ.dequantize(module), wanted), f"{name} in {kind}"


def test_the_packed_matmul_has_the_library_s_weights(comparison, small):
    """Up to the rounding of (8 − zero) · scale to bf16, which moves a weight by less than a tenth of a step."""
    cell = next(c for c in comparison.cells if c.variant == "hqq")
    assert cell.status == "ok" and cell.kernel == "torch int4pack", cell.error
    model = HQQ.load(open_checkpoint(str(small)), resolve("hqq"), CPU, lambda *_: None).model
    library = library_model(small, 4, 64)
    assert cell.memory.weight_bytes + cell.memory.quant_state_bytes == stored_bytes(library)
    module, wanted = model.get_submodule(Q), library.get_submodule(Q)
    assert set(HQQ.quant_state(module)) == {"scale and zero point"}
    step = wanted.meta["scale"].float().reshape(128, 2).repeat_interleave(64, 1)
    apart = (HQQ.dequantize(module) - wanted.dequantize().float()).abs() / step
    assert float(apart.max()) < 0.1, f"{float(apart.max()):.2f} of a step: codes or zero points are misplaced"


def test_a_kernel_that_does_not_fit_is_refused_or_left_out(small):
    for notation in ("hqq:3bit,kernel=int4pack", "hqq:g16,kernel=int4pack", "hqq:dtype=fp16,kernel=int4pack"):
        with pytest.raises(UserError, match="kernel=unpack"):
            resolve(notation)
    model = HQQ.load(open_checkpoint(str(small)), resolve("hqq:dtype=fp32"), CPU, lambda *_: None)
    assert model.kernel == "hqq, unpacked to the activations' dtype"


def test_the_copied_code_gives_the_same_tokens(comparison, saved):
    cell, copied = column(comparison, "hqq:kernel=unpack"), {}
    exec(snippet(cell, comparison), copied)
    assert tuple(copied["new_tokens"]) == cell.token_ids
    with pytest.raises(UserError, match="transformers 5 does not load HQQ"):
        HQQ.code(resolve(f"hqq@{saved}"), CPU)


# ---------------------------------------------------------------- ready-made


def test_a_ready_made_checkpoint_gives_what_is_made_on_the_spot(comparison):
    ready = column(comparison, "hqq@")
    made = column(comparison, "hqq:kernel=unpack")
    assert ready.status == "ok", ready.error
    assert ready.token_ids == made.token_ids
    rows = [
        {r.name: (r.bytes, r.quant_state_bytes, r.logical_dtype) for r in c.layers} for c in (ready, made)
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(("bits", "axis", "view"), [(4, 0, False), (3, 1, False), (4, 1, True), (2, 1, True)])
def test_other_layouts_are_read(tmp_path, bits, axis, view):
    """Groups along columns, ten values in an int32, and bytes viewed as floats for FSDP."""
    import torch

    tiny_models.save(tmp_path / "tiny", hidden_size=64, intermediate_size=128, dtype="bfloat16")
    folder = save(tmp_path / "tiny", tmp_path / "saved", bits, 32, axis, view)
    checkpoint = open_checkpoint(str(tmp_path / "tiny"))
    variant = HQQ.complete(resolve(f"hqq@{folder}:kernel=unpack"), checkpoint)
    loaded, library = (
        HQQ.load(checkpoint, variant, CPU, lambda *_: None),
        library_model(tmp_path / "tiny", bits, 32, axis),
    )
    for name, module in loaded.model.named_modules():
        if HQQ.owns(module):
            assert torch.equal(module.dequantize(), library.get_submodule(name).dequantize()), name
    assert any("along columns" in note for note in loaded.notes) == (axis == 0)


def test_layers_of_several_kinds(tmp_path):
    """As HqqConfig's dynamic_config made them."""
    from safetensors.torch import load_file

    tiny_models.save(tmp_path / "tiny", hidden_size=64, intermediate_size=128, dtype="bfloat16")
    four = save(tmp_path / "tiny", tmp_path / "four", 4, 32)
    eight = load_file(save(tmp_path / "tiny", tmp_path / "eight", 8, 64) / "model.safetensors")
    mixed = formats.rewrite(four, tmp_path / "mixed", lambda n, t: {n: eight[n]} if "v_proj" in n else None)
    checkpoint = open_checkpoint(str(tmp_path / "tiny"))
    variant = HQQ.complete(resolve(f"hqq@{mixed}"), checkpoint)
    assert variant.notation.endswith(":g32")
    loaded = HQQ.load(checkpoint, variant, CPU, lambda *_: None)
    kinds = Counter(
        m.quant_config["weight_quant_params"]["nbits"] for m in loaded.model.modules() if HQQ.owns(m)
    )
    assert kinds == {4: 12, 8: 2} and any("8 bits in groups of 64" in note for note in loaded.notes)


def text(words: str):
    import torch

    return torch.tensor([ord(c) for c in words], dtype=torch.uint8)


@pytest.mark.parametrize(
    ("setting", "change", "words"),
    [
        ("compute_dtype", lambda t: text("__import__('os').abort()"), ["multiplies in", "__import__"]),
        ("nbits", lambda t: t * 0 + 5, ["nbits 5"]),
        ("group_size", lambda t: t * 0 + 2**31 - 1, ["group_size 2147483647"]),
        ("shape", lambda t: t * 2**40, ["shape"]),
        ("packing", lambda t: text("8bit_u8"), ["8bit_u8", "4bit_u8"]),
        ("packing", lambda t: text("4bit_u8" * 1000), ["7,000 bytes"]),
        ("scale", lambda t: t[:7], ["scale", "(7, 1)"]),
        ("W_q", lambda t: t[:7], ["W_q", "(7, 64)"]),
        ("zero", None, ["no zero"]),
        ("quant_scale", lambda t: t * 0 + 1, ["quantized scales"]),
    ],
)
def test_what_would_load_as_something_else_is_refused(saved, small, tmp_path, setting, change, words):
    """hqq itself would evaluate the text of compute_dtype as Python."""
    name = f"{Q}.{setting}"

    def damage(stored, tensor):
        return None if stored != name else {} if change is None else {name: change(tensor)}

    said = formats.refused(f"hqq@{formats.rewrite(saved, tmp_path / 'damaged', damage)}", small)
    assert Q in said and all(word in said for word in words), said


def test_other_sources_are_refused_by_name(small, saved, tmp_path):
    assert "not quantized" in formats.refused(f"hqq@{small}", small)
    assert "bits=8 is requested" in formats.refused(f"hqq@{saved}:8bit", small)
    tiny_models.save(tmp_path / "tiny", hidden_size=64, intermediate_size=128, dtype="bfloat16")
    other = save(tmp_path / "tiny", tmp_path / "other", 4, 32)
    assert "hidden_size 64" in formats.refused(f"hqq@{other}", small)
    with pytest.raises(UserError, match="quantized already"):
        HQQ.complete(resolve("hqq"), open_checkpoint(str(saved)))


def test_groups_that_divide_no_layer(small, tmp_path):
    assert "128" in formats.refused("hqq:g256", small)
    tiny_models.save(tmp_path / "tiny", hidden_size=32, intermediate_size=96, dtype="bfloat16")
    checkpoint = open_checkpoint(str(tmp_path / "tiny"))
    assert HQQ.complete(resolve("hqq"), checkpoint).notation == "hqq:g32"


def test_layouts():
    """Shapes of hqq/core/bitpack.py, by hand."""
    assert Layout(4, 64).packed(128, 256) == (256, 64) and Layout(4, 64).scales(128, 256) == (512, 1)
    assert Layout(3, 32).packed(10, 64) == (2, 32) and Layout(3, 32).bytes(10, 64, 2) == (
        2 * 32 * 4,
        2 * 20 * 2,
    )
    assert Layout(2, 16, axis=0).packed(64, 8) == (4, 32) and Layout(2, 16, axis=0).scales(64, 8) == (1, 32)
    assert Layout(4, 64, view="bf16").stored(128, 256) == (256, 32)
    assert not Layout(4, 64).divides(128, 96) and not Layout(2, 64).divides(1, 64)


# ---------------------------------------------------------------- adapters and training


def test_an_adapter_works_and_what_rounds_again_is_refused(own_engine, small, tmp_path):
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(small, dtype=torch.bfloat16)
    lora = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    made = formats.run(own_engine, small, ["hqq:kernel=unpack", "hqq"], str(tmp_path / "lora"))
    assert [c.status for c in made.cells] == ["ok", "ok"], [c.error for c in made.cells]
    wanted = PeftModel.from_pretrained(
        copy.deepcopy(library_model(small, 4, 64)), tmp_path / "lora", torch_device="cpu"
    )
    assert made.cells[0].token_ids == formats.generated(wanted.eval(), small)
    for kind in (AdapterKind("user/x", "LoRA", "LORA", merged=True), AdapterKind("user/x", "LoHa", "LOHA")):
        with pytest.raises(UserError, match="unmerged LoRA"):
            HQQ.check_adapter(resolve("hqq"), kind)


def test_it_is_trained_on_with_the_kernel_that_has_gradients(small):
    import torch
    from peft import LoraConfig, get_peft_model

    checkpoint = open_checkpoint(str(small))
    ((variant, notes),) = HQQ.training_variants(resolve("hqq"), "cpu")
    assert variant.notation == "hqq:kernel=unpack" and notes == ()
    base = base_model.load(checkpoint, variant, "cpu", False, lambda *a: None)
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj"]))
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients)


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["graph", "compiled"])
@pytest.mark.parametrize("notation", ["hqq", "hqq:kernel=unpack", "hqq:3bit", "hqq:8bit", "hqq:2bit,g32"])
def test_a_captured_step_gives_the_eager_tokens(gpu, two_layers, own_engine, notation, decode):
    made = {}
    for way in ("eager", decode):
        request = api.request(
            formats.PROMPT,
            [notation],
            str(two_layers),
            max_new_tokens=16,
            fidelity="none",
            chat=False,
            decode=way,
        )
        (made[way],) = runner.run(request, engine=own_engine, emit=lambda event: None).cells
        own_engine.unload()
        assert made[way].status == "ok", made[way].error
    assert not [n for n in made[decode].notes if n.startswith(("Decoded eagerly", "Not compiled"))]
    assert made[decode].token_ids[:4] == made["eager"].token_ids[:4]
    packed = notation == "hqq"
    assert made[decode].kernel == ("torch int4pack" if packed else "hqq, unpacked to the activations' dtype")


@pytest.mark.gpu
def test_the_packed_matmul_on_cuda_has_the_library_s_weights(gpu, two_layers):
    checkpoint = open_checkpoint(str(two_layers))
    packed = HQQ.load(checkpoint, resolve("hqq"), Placement(gpu), lambda *_: None).model
    plain = HQQ.load(checkpoint, resolve("hqq:kernel=unpack"), Placement(gpu), lambda *_: None).model
    for name, module in plain.named_modules():
        if HQQ.owns(module):
            step = module.scale.float().reshape(module.out_features, -1).repeat_interleave(64, 1)
            apart = (HQQ.dequantize(packed.get_submodule(name)) - HQQ.dequantize(module)).abs() / step
            assert float(apart.max()) < 0.1, name
