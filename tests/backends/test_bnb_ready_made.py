"""Checkpoints that bitsandbytes quantized and transformers saved, `nf4@`, `fp4@` and `int8@`: real weights, saved here by the
library itself, against the variants made on the spot, against plain transformers, and against sums over the files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models

from comparator.backends import backend_for, require_full_precision, resolve
from comparator.backends.base import AdapterKind, Placement
from comparator.comparison.runner import compare
from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings, Request
from comparator.core.variant import Cell, parse_adapter
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint
from comparator.training import base_model, memory_estimate
from comparator.training.settings import TrainSettings

PROMPT = "The capital of France is"
BNB = backend_for(resolve("nf4"))
KINDS = {  # method and options as made on the spot → what BitsAndBytesConfig is given
    "nf4:skip=k_proj+model.layers.1.mlp": {"llm_int8_skip_modules": ["k_proj", "lm_head", "model.layers.1.mlp", "tower"]},
    "nf4:dq,compute=fp32": {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "float32"},
    "fp4:compute=fp16,dtype=fp16,storage=bf16": {"bnb_4bit_quant_storage": "bfloat16", "bnb_4bit_compute_dtype": "float16"},
    "int8:threshold=4": {"llm_int8_threshold": 4.0},
}  # fmt: skip
REAL = ("nf4:dq,compute=fp32", "int8:threshold=4")


def save(
    source: Path, target: Path, method: str = "nf4", dtype: str = "bfloat16", auto=None, **settings
) -> Path:
    """`source`, quantized by bitsandbytes as transformers loads it, and saved by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    four = {"load_in_4bit": True, "bnb_4bit_quant_type": method, "bnb_4bit_compute_dtype": "bfloat16"}
    config = BitsAndBytesConfig(**{**({"load_in_8bit": True} if method == "int8" else four), **settings})
    model = (auto or AutoModelForCausalLM).from_pretrained(
        source, dtype=getattr(torch, dtype), quantization_config=config, device_map="cpu"
    )
    model.save_pretrained(target)
    for file in source.glob("*token*"):
        shutil.copy(file, target)
    return target


def run(engine, model: Path, *variants: str, adapter: str | None = None):
    cells = tuple(Cell(resolve(v), parse_adapter(adapter) if adapter else None) for v in variants)
    request = Request(str(model), cells, PROMPT, chat=False, settings=GenerationSettings(max_new_tokens=4),
                      fidelity="none")  # fmt: skip
    return list(compare(request, engine=engine))[-1].comparison


def change(folder: Path, target: Path, tensors=None, **quantization) -> Path:
    """A copy of a checkpoint with its tensors changed by a function, and entries of its quantization_config."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, target)
    if tensors is not None:
        found = load_file(target / "model.safetensors")
        tensors(found)
        save_file(found, target / "model.safetensors", {"format": "pt"})
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"].update(quantization)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def model_of(two_layers, tiny):
    """The model of a kind: real weights for two of them, a random small model for the others."""
    return lambda kind: two_layers if kind in REAL else tiny["plain"]


@pytest.fixture(scope="module")
def saved(model_of, tmp_path_factory):
    """`saved(kind)`: the kind's model, saved as this kind."""
    folder, made = tmp_path_factory.mktemp("bnb"), {}

    def one(kind: str) -> Path:
        if kind not in made:
            dtype = "float16" if "dtype=fp16" in kind else "bfloat16"
            made[kind] = save(
                model_of(kind), folder / f"saved-{len(made)}", kind.partition(":")[0], dtype, **KINDS[kind]
            )
        return made[kind]

    return one


@pytest.fixture(scope="module")
def columns(own_engine, model_of, saved):
    """`columns(kind)`: the comparison of the variant made on the spot and the same as it was saved; int8 after bf16,
    which lends its tensors."""
    made = {}

    def one(kind: str):
        if kind not in made:
            first = ["bf16"] if kind.startswith("int8") else []
            made[kind] = run(
                own_engine, model_of(kind), *first, kind, f"{kind.partition(':')[0]}@{saved(kind)}"
            )
        return made[kind]

    return one


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """A random model, saved in each type; `plain` is full precision."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.save(folder / "plain", hidden_size=64, intermediate_size=128, dtype="bfloat16")
    return {"plain": folder / "plain"} | {
        m: save(folder / "plain", folder / m, m) for m in ("nf4", "fp4", "int8")
    }


def refused(folder: Path, model: Path, variant: str = "nf4", *options: str) -> str:
    """What `complete` says, which loads nothing."""
    written = resolve(f"{variant}@{folder}" + (f":{','.join(options)}" if options else ""))
    with pytest.raises(UserError) as caught:
        backend_for(written).complete(written, open_checkpoint(str(model)))
    assert caught.value.advice
    return str(caught.value)


# ---------------------------------------------------------------- the same as on the spot, and as the library


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_variant_made_on_the_spot(columns, saved, kind):
    made, loaded = columns(kind).cells[-2:]
    assert (made.status, loaded.status) == ("ok", "ok"), (made.error, loaded.error)
    method, _, options = kind.partition(":")
    assert loaded.variant == f"{method}@{saved(kind)}:{options}", "the options come from the checkpoint"
    assert loaded.token_ids == made.token_ids
    assert loaded.layers == made.layers, "dtypes, shapes, bytes, and what they were before the first forward"
    for name in ("loaded_weight_bytes", "loaded_quant_state_bytes", "weight_bytes", "quant_state_bytes"):
        assert getattr(loaded.memory, name) == getattr(made.memory, name), name
    assert not any("resident weights of" in note for note in loaded.notes), (
        "it was made from the comparison's own tensors"
    )
    if kind.startswith("int8"):
        assert any("resident weights of" in note for note in made.notes), (
            "nothing was lent, so nothing was refused"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_the_library_gives(columns, model_of, saved, kind):
    """Tokens of plain `generate`; rows against the stored tensors; unpacked weights."""
    import bitsandbytes.functional as F
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, column = saved(kind), columns(kind).cells[-1]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="cpu").eval()
    layer = model.model.layers[1].self_attn.q_proj
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    beside = [t for n, t in stored.items() if n.startswith((f"{name}.", name.replace("weight", "SCB")))
              and "quant_state" not in n]  # fmt: skip
    row = next(r for r in column.layers if r.name == name)
    before = row.loaded or row
    size, state = stored[name].nbytes, sum(t.nbytes for t in beside)
    state += 4 if "dq" in kind else 0  # the offset of double quantization lies in the record, as a number
    assert (row.logical_dtype, row.shape) == (kind.partition(":")[0], (layer.out_features, layer.in_features))
    assert (before.bytes, before.quant_state_bytes) == (size, state)
    assert row.bits_per_weight == 8 * (row.bytes + row.quant_state_bytes) / row.parameters
    plain = sum(
        t.nbytes for t in stored.values() if t.dtype in (torch.bfloat16, torch.float16) and t.shape[-1] != 1
    )
    assert plain == sum(r.bytes for r in column.layers if r.logical_dtype in ("bf16", "fp16"))
    if kind.startswith("int8"):
        wanted = F.int8_vectorwise_dequant(stored[name], stored[name.replace("weight", "SCB")])
    else:
        wanted = F.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    given = BNB.dequantize(layer)
    assert given.dtype == torch.float32 and torch.equal(given, wanted.float())
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, do_sample=False)
    assert tuple(out[0, ids.shape[1] :].tolist()) == column.token_ids


@pytest.mark.parametrize("kind", KINDS)
def test_what_it_needs_is_what_it_takes(columns, model_of, kind):
    column, checkpoint = columns(kind).cells[-1], open_checkpoint(str(model_of(kind)))
    variant = resolve(column.variant)
    held = column.memory.loaded_weight_bytes + column.memory.loaded_quant_state_bytes
    assert BNB.needed_bytes(variant, checkpoint) == pytest.approx(held, rel=0.01)
    plain = sum(r.parameters for r in column.layers if r.logical_dtype in ("bf16", "fp16"))
    assert BNB.training_bytes(variant, checkpoint) == pytest.approx(held + 2 * plain, rel=0.01), (
        "the rest in fp32"
    )
    assert BNB.complete(variant, checkpoint) == variant, "completing it again changes it"


def test_the_compute_dtype_may_be_another(own_engine, two_layers, saved):
    """It is how the layers multiply, and nothing of it is stored; left out, it is the checkpoint's."""
    source = f"nf4@{saved('nf4:dq,compute=fp32')}"
    own, other = (
        BNB.complete(resolve(source + o), open_checkpoint(str(two_layers))) for o in ("", ":compute=bf16")
    )
    assert own.notation == f"{source}:dq,compute=fp32" and other.notation == f"{source}:dq,compute=bf16"
    assert BNB.complete(other, open_checkpoint(str(two_layers))) == other, "the default was taken for nothing"
    comparison = run(own_engine, two_layers, other.notation)
    (cell,) = comparison.cells
    assert {r.compute_dtype for r in cell.layers if r.logical_dtype == "nf4"} == {"bf16"}
    copied: dict = {}
    exec(snippet(cell, comparison), copied)
    assert copied["model"].model.layers[0].mlp.up_proj.compute_dtype is copied["torch"].bfloat16
    assert tuple(copied["new_tokens"]) == cell.token_ids


def test_the_code_runs(columns):
    comparison = columns("int8:threshold=4")
    copied: dict = {}
    code = snippet(comparison.cells[-1], comparison)
    exec(code, copied)
    assert tuple(copied["new_tokens"]) == comparison.cells[-1].token_ids
    assert "BitsAndBytesConfig" not in code, "the checkpoint says how it was quantized"


def test_the_code_names_the_revision():
    variant = resolve("nf4@user/repo@v1:compute=fp16,dtype=fp16")
    imports, setup, arguments = BNB.code(variant, Placement("cuda:0"))
    assert (
        setup[0] == "config = AutoConfig.from_pretrained('user/repo', revision='v1')"
        and "float16" in setup[1]
    )
    assert arguments == ["config=config", "dtype=torch.float16"]
    assert imports == ["from transformers import AutoConfig"] and BNB.code_weights(variant) == "'user/repo'"


def test_blocks_of_another_size(own_engine, tiny, tmp_path):
    """bitsandbytes for AMD had 128 weights to a scale; the packed kernel of a CPU fails on these layers of 64 inputs."""
    import bitsandbytes.functional as F
    from safetensors.torch import load_file

    plain = load_file(tiny["plain"] / "model.safetensors")

    def pack(tensors) -> None:
        for name in [n.removesuffix(".absmax") for n in tensors if n.endswith(".absmax")]:
            tensors[name], state = F.quantize_4bit(plain[name], quant_type="nf4", blocksize=128)
            tensors |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}

    comparison = run(own_engine, tiny["plain"], f"nf4@{change(tiny['nf4'], tmp_path / 'blocks', pack)}")
    (cell,) = comparison.cells
    assert cell.status == "ok", cell.error
    layer = next(r for r in cell.layers if r.name.endswith("1.mlp.up_proj.weight"))
    assert (layer.bytes, layer.quant_state_bytes) == (128 * 64 // 2, 128 * 64 // 128 * 4 + 64)
    copied: dict = {}
    exec(snippet(cell, comparison), copied)
    assert tuple(copied["new_tokens"]) == cell.token_ids


@pytest.mark.parametrize("method", ["nf4", "int8"])
def test_the_file_can_go_after_loading(tiny, tmp_path, own_engine, method):
    """transformers maps it; what is loaded has to lie in memory of its own."""
    folder = Path(shutil.copytree(tiny[method], tmp_path / "gone"))
    run(own_engine, tiny["plain"], f"{method}@{folder}")
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(folder) not in maps.read_text()


def test_families_and_heads(own_engine, tmp_path):
    """A head that is quantized too, GPT-2's transposed layers, experts that stay in 16 bits, and a long list of modules."""
    head, gpt, experts = tmp_path / "head", tmp_path / "gpt", tmp_path / "experts"
    tiny_models.save(head, hidden_size=64, intermediate_size=128, dtype="bfloat16", tie_word_embeddings=False)
    tiny_models.save(gpt, "gpt2", n_embd=64, dtype="bfloat16")
    tiny_models.save(experts, "mixtral", hidden_size=64, dtype="bfloat16")
    left = ["q_proj", "v_proj", "k_proj", "up_proj", "model.layers.1.mlp", "lm_head"]
    for source, made, settings, written in (
        (head, "nf4:skip=only+q_proj", {"llm_int8_skip_modules": ["q_proj"]}, ":skip=only+q_proj"),
        (head, f"nf4:skip={'+'.join(left)}", {"llm_int8_skip_modules": left}, ""),
        (gpt, "int8", {}, ""),
        (experts, "nf4", {}, ""),
    ):
        method = made.partition(":")[0]
        folder = save(
            source, tmp_path / f"{source.name}-{len(written)}-{len(settings)}-saved", method, **settings
        )
        one, other = run(own_engine, source, made, f"{method}@{folder}").cells
        assert other.variant == f"{method}@{folder}{written}", other.error
        assert (one.token_ids, one.layers) == (other.token_ids, other.layers)
        needed = BNB.needed_bytes(resolve(other.variant), open_checkpoint(str(source)))
        held = other.memory.loaded_weight_bytes + other.memory.loaded_quant_state_bytes
        assert needed == pytest.approx(held, rel=0.03)
        if source is experts:
            assert any("experts" in note and "no linear layers" in note for note in other.notes)
        if settings.get("llm_int8_skip_modules") is left:
            assert any("names 5 modules" in note for note in other.notes)


def test_the_text_part_of_a_model_of_text_and_images(own_engine, tmp_path):
    """transformers renames its layers; a skip list that goes by the old names is refused."""
    import torch
    import transformers

    sizes = {"vocab_size": tiny_models.VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "linear_key_head_dim": 16,
             "linear_value_head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
             "layer_types": ["linear_attention", "full_attention"], "eos_token_id": 1}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 64}
    config = transformers.Qwen3_5Config(text_config=sizes, vision_config=vision)
    torch.manual_seed(0)
    transformers.Qwen3_5ForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(
        tmp_path / "plain"
    )
    tiny_models.tokenizer().save_pretrained(tmp_path / "plain")
    auto = transformers.AutoModelForImageTextToText
    folder = save(tmp_path / "plain", tmp_path / "saved", auto=auto)
    one, other = run(own_engine, tmp_path / "plain", "nf4", f"nf4@{folder}").cells
    assert other.status == "ok", other.error
    assert (one.token_ids, one.layers) == (other.token_ids, other.layers)
    skip = ["lm_head", "visual", "model.language_model.layers.1.mlp"]
    folder = save(tmp_path / "plain", tmp_path / "listed", auto=auto, llm_int8_skip_modules=skip)
    (cell,) = run(own_engine, tmp_path / "plain", f"nf4@{folder}").cells
    assert (
        "no packed weight for model.layers.1.mlp" in cell.error.problem
        and "llm_int8_skip_modules" in cell.error.advice
    )


# ---------------------------------------------------------------- adapters and training


def test_a_lora_works_and_what_does_not_is_refused_by_name(own_engine, tiny, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny["plain"], dtype=torch.bfloat16)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path)
    for method in ("nf4", "int8"):
        for adapter in (str(tmp_path), f"{tmp_path}:merged"):
            one, other = run(
                own_engine, tiny["plain"], method, f"{method}@{tiny[method]}", adapter=adapter
            ).cells
            assert one.status == other.status == "ok", (one.error, other.error)
            assert one.token_ids == other.token_ids
    with pytest.raises(UserError, match="LoHa"):
        BNB.check_adapter(resolve(f"nf4@{tiny['nf4']}"), AdapterKind("x", "LoHa", "LOHA"))


def test_it_is_trained_on(tiny):
    import torch
    from peft import LoraConfig, get_peft_model

    checkpoint, variant = open_checkpoint(str(tiny["plain"])), resolve(f"nf4@{tiny['nf4']}")
    base = base_model.load(checkpoint, variant, "cpu", False, lambda *a: None)
    held = sum(t.numel() * t.element_size() for t in base.model.parameters())
    assert BNB.training_bytes(variant, checkpoint) == pytest.approx(held, rel=0.05)
    model = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj"]))
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert gradients and all(g is not None and g.abs().sum() > 0 for g in gradients)
    wanted = TrainSettings(target_modules=("q_proj",))
    little = memory_estimate.estimate(
        checkpoint, resolve("bf16"), wanted, rows=8, longest=16, device="cpu", free_bytes=0
    )
    assert "train on fp4" in little.problem.advice or "nf4" in little.problem.advice, (
        "a smaller base is still advised"
    )


# ---------------------------------------------------------------- refused by name, before anything is loaded


def test_another_method_another_model(tiny, tmp_path):
    def said(words: str, variant: str, source: str) -> None:
        text = refused(tiny[source], tiny["plain"], variant)
        assert all(w in text for w in words.split("|")), text

    said("to fp4, not to nf4|Write fp4@", "nf4", "fp4")
    said("to nf4, not to int8|Write nf4@", "int8", "nf4")
    said("to int8, not to fp4|Write int8@", "fp4", "int8")
    said("is not quantized", "nf4", "plain")
    said("with bitsandbytes, not gptq|Write nf4@", "gptq", "nf4")
    tiny_models.save(tmp_path / "other", hidden_size=32, dtype="bfloat16")
    assert "hidden_size 64" in refused(tiny["nf4"], tmp_path / "other")


@pytest.mark.parametrize(
    ("method", "option", "words"),
    [
        ("nf4", "dq", "dq=true is requested"),
        ("nf4", "storage=bf16", "made with storage=uint8"),
        ("nf4", "dtype=fp32", "made with dtype=bf16"),
        ("nf4", "skip=q_proj", "made with no skip="),
        ("int8", "threshold=2", "made with threshold=6"),
    ],
)
def test_an_option_that_contradicts_the_checkpoint(tiny, method, option, words):
    assert words in refused(tiny[method], tiny["plain"], method, option)


def test_defaults_that_contradict_it_too(saved, two_layers, tiny):
    folder = saved("nf4:dq,compute=fp32")
    assert "dq=false is requested" in refused(folder, two_layers, "nf4", "dq=false")
    folder = saved("fp4:compute=fp16,dtype=fp16,storage=bf16")
    assert "dtype=bf16 is requested" in refused(folder, tiny["plain"], "fp4", "dtype=bf16")
    kept = "nf4:skip=k_proj+model.layers.1.mlp"
    variant = resolve(f"nf4@{saved(kept)}:skip=model.layers.1.mlp+lm_head+k_proj")
    assert BNB.complete(variant, open_checkpoint(str(tiny["plain"]))) == variant, (
        "the head is left alone anyway"
    )


LAYER = "model.layers.1.mlp.up_proj"
DAMAGES = {  # name → (method, what is done to the tensors, words of the refusal)
    "absmax": ("nf4", lambda t: t.pop(f"{LAYER}.weight.absmax"), f"{LAYER} has no weight.absmax"),
    "codebook": ("nf4", lambda t: t.pop(f"{LAYER}.weight.quant_map"), f"{LAYER} has no weight.quant_map"),
    "record": ("nf4", lambda t: t.pop(f"{LAYER}.weight.quant_state.bitsandbytes__nf4"), f"{LAYER} has no record"),
    "unreadable": ("nf4", lambda t: t[f"{LAYER}.weight.quant_state.bitsandbytes__nf4"].fill_(7), "cannot be read"),
    "stranger": ("nf4", lambda t: rewrite(t, dtype="load"), "cannot be read"),
    "nested": ("nf4", lambda t: rewrite(t, nested_blocksize=256, nested_dtype="float32", nested_offset=0.5), "half of"),
    "weight": ("nf4", lambda t: cut(t, f"{LAYER}.weight", 100), f"{LAYER}.weight"),
    "blocks": ("nf4", lambda t: cut(t, f"{LAYER}.weight.absmax", 5), f"{LAYER}.weight.absmax has 20 bytes"),
    "scales": ("int8", lambda t: t.pop(f"{LAYER}.SCB"), f"{LAYER} has no SCB"),
    "rows": ("int8", lambda t: cut(t, f"{LAYER}.SCB", 5), "(128, 64) and fp32 scales (SCB) of (5,)"),
    "int8 weight": ("int8", lambda t: cut(t, f"{LAYER}.weight", 5), f"{LAYER} has int8 weights of (5, 64)"),
    "layout": ("int8", lambda t: t[f"{LAYER}.weight_format"].fill_(2), "weight_format 2"),
}  # fmt: skip


def rewrite(tensors, **changes) -> None:
    """Change the record that lies beside a 4-bit weight as JSON."""
    import torch

    name = f"{LAYER}.weight.quant_state.bitsandbytes__nf4"
    record = json.dumps({**json.loads(bytes(tensors[name].tolist())), **changes})
    tensors[name] = torch.tensor(list(record.encode()), dtype=torch.uint8)


def cut(tensors, name: str, rows: int) -> None:
    tensors[name] = tensors[name][:rows].clone()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_names_the_layer(tiny, tmp_path, damage):
    method, work, words = DAMAGES[damage]
    said = refused(change(tiny[method], tmp_path / "damaged", work), tiny["plain"], method)
    assert words in said, said


def test_a_config_that_does_not_fit_the_weights(tiny, tmp_path):
    def said(words: str, method: str = "nf4", source: str | None = None, **quantization) -> None:
        folder = change(
            tiny[source or method], tmp_path / f"changed-{len(list(tmp_path.iterdir()))}", **quantization
        )
        text = refused(folder, tiny["plain"], method)
        assert all(w in text for w in words.split("|")), text

    said("says nf4|holds fp4", "nf4", "fp4", bnb_4bit_quant_type="nf4")
    said("q_proj|quantized, and is in|llm_int8_skip_modules", llm_int8_skip_modules=["lm_head", "q_proj"])
    said("not quantized, and is not in", llm_int8_skip_modules=["x_proj"])
    said("not the name of a module", llm_int8_skip_modules=["(([a-z])*)*!"])
    said("bnb_4bit_compute_dtype=float64", bnb_4bit_compute_dtype="float64")
    said("llm_int8_threshold=-1", "int8", llm_int8_threshold=-1.0)
    said("cannot read the quantization_config|llm_int8_threshold", llm_int8_threshold=6)
    said("cannot read the quantization_config|no_such", bnb_4bit_compute_dtype="no_such")
    said("in a way that no method here loads", bnb_4bit_quant_type="nf5")


def test_experts_that_an_older_transformers_quantized_are_refused(tmp_path):
    """It kept each expert as a linear layer; this one has one parameter for all of a layer."""
    import bitsandbytes.functional as F

    tiny_models.save(tmp_path / "plain", "mixtral", hidden_size=64, dtype="bfloat16")
    folder = save(tmp_path / "plain", tmp_path / "new")

    def pack(tensors) -> None:
        for name in [n for n in tensors if ".experts." in n]:
            packed, state = F.quantize_4bit(tensors[name], quant_type="nf4")
            tensors[name] = packed
            tensors |= {f"{name}.{k}": v for k, v in state.as_dict(packed=True).items()}

    said = refused(change(folder, tmp_path / "old", pack), tmp_path / "plain")
    assert "experts" in said and "older transformers" in said


# ---------------------------------------------------------------- where else a checkpoint is named


def test_a_model_that_is_saved_quantized_names_its_own_method(tiny):
    for method in ("nf4", "fp4", "int8"):
        with pytest.raises(UserError) as caught:
            require_full_precision(open_checkpoint(str(tiny[method])))
        assert f"variant {method}@" in caught.value.advice
    unknown = replace(open_checkpoint(str(tiny["nf4"])), quantization={"quant_method": "bitsandbytes"})
    with pytest.raises(UserError, match="it was made from"):
        require_full_precision(unknown)


def test_doctor_takes_it(tiny):
    from typer.testing import CliRunner

    from comparator.cli import app

    ask = ["doctor", str(tiny["plain"]), "-v", f"nf4@{tiny['nf4']}", "-v", f"fp4@{tiny['int8']}"]
    said = CliRunner().invoke(app, ask, env={"COLUMNS": "1000", "NO_COLOR": "1"})
    text = " ".join(said.stdout.split())
    assert f"nf4@{tiny['nf4']}, about" in text and "to int8, not to fp4" in text


def test_parameters_are_the_models_own(saved, model_of):
    """Packed values count unpacked, whatever dtype their buffer has."""
    for kind in KINDS:
        assert (
            open_checkpoint(str(saved(kind))).parameters == open_checkpoint(str(model_of(kind))).parameters
        ), kind
