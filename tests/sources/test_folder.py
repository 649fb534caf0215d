"""A folder is opened by its headers alone, and what it lacks is said by name."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_models

from comparator import sources
from comparator.core.errors import UserError
from comparator.sources import open_checkpoint

ROOT = Path(__file__).resolve().parents[2]

FAMILIES = [
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma",
    "phi",
    "opt",
    "bloom",
    "gpt2",
    "gpt_neox",
    "mamba",
    "mpt",
]
CONTEXT = {"bloom": None, "mamba": None}


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save(folder, "llama", chat=True)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))


def refused(folder: Path, *words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        open_checkpoint(str(folder))
    said = str(caught.value)
    assert caught.value.advice, f"no way out is offered: {said}"
    for word in words:
        assert word.lower() in said.lower(), f"“{word}” is missing from: {said}"
    return caught.value


# ---------------------------------------------------------------- what works


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_counts_the_parameters_that_the_model_has(family: str, tmp_path: Path) -> None:
    model = tiny_models.save(tmp_path, family, dtype="bfloat16")
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.parameters == tiny_models.unique_parameters(model)
    assert checkpoint.architecture == type(model).__name__
    assert checkpoint.dtype == "bf16"
    assert checkpoint.context_length == CONTEXT.get(family, 128)
    assert checkpoint.vocab_size == tiny_models.VOCABULARY
    assert checkpoint.has_chat_template is False
    output = model.get_output_embeddings().weight
    assert checkpoint.tied == (output is model.get_input_embeddings().weight)
    stored = {t.name: (t.shape, t.bytes) for t in checkpoint.tensors}
    assert sum(t.bytes for t in checkpoint.tensors) == 2 * sum(t.parameters for t in checkpoint.tensors)
    assert stored, "no tensors were listed"


def test_of_a_model_of_text_and_images_the_text_part_counts(tmp_path: Path) -> None:
    import transformers

    text = {
        "vocab_size": tiny_models.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
        "layer_types": ["linear_attention", "full_attention"], "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5Config(text_config=text, vision_config=vision)
    transformers.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert checkpoint.architecture == type(loaded).__name__ == "Qwen3_5ForCausalLM"
    assert checkpoint.parameters == tiny_models.unique_parameters(loaded)
    assert not [t.name for t in checkpoint.tensors if "visual" in t.name]
    assert checkpoint.context_length == 128 and "text part" in checkpoint.note


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2", "gemma"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny_models.save(tmp_path, family, tie_word_embeddings=tied)
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tied is tied
    assert checkpoint.parameters == tiny_models.unique_parameters(model), (
        "a tied head counts once, an untied twice"
    )


def test_a_tied_head_that_is_stored_a_second_time_counts_once(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = tiny_models.save(tmp_path, "llama", tie_word_embeddings=True)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(tmp_path))
    assert (checkpoint.tied, checkpoint.parameters) == (True, tiny_models.unique_parameters(model))
    # A head that differs is not tied, whatever the config says; transformers sees it so as well.
    weights["lm_head.weight"][3, 3] += 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.tied is False
    assert checkpoint.parameters == tiny_models.unique_parameters(model) + weights["lm_head.weight"].numel()


def test_old_buffers_are_no_parameters(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    model = tiny_models.save(tmp_path, "gpt2")
    weights = load_file(tmp_path / "model.safetensors")
    weights["transformer.h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    weights["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(str(tmp_path)).parameters == tiny_models.unique_parameters(model)


def test_shards_with_an_index(tmp_path: Path) -> None:
    model = tiny_models.save(tmp_path, "llama", max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    checkpoint = open_checkpoint(str(tmp_path))
    assert checkpoint.parameters == tiny_models.unique_parameters(model)
    shards[1].unlink()
    refused(tmp_path, shards[1].name, "is missing 1 of")


def test_facts_of_a_chat_model(llama: Path) -> None:
    facts = open_checkpoint(str(llama)).facts()
    assert facts.has_chat_template and facts.context_length == 128 and facts.dtype == "fp32"
    assert facts.source == str(llama) and facts.revision is None and facts.note is None
    assert sources.look_up(str(llama)) == facts


def test_a_chat_template_inside_tokenizer_config(copy: Path) -> None:
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    assert open_checkpoint(str(copy)).has_chat_template is False
    file = copy / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    assert open_checkpoint(str(copy)).has_chat_template is True


def test_opening_a_folder_imports_neither_torch_nor_transformers(llama: Path) -> None:
    code = (
        "import sys, time\n"
        "from comparator.sources import open_checkpoint\n"
        "start = time.process_time()\n"
        f"open_checkpoint({str(llama)!r})\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub', 'gguf'} & set(sys.modules)\n"
        "print(sorted(heavy), time.process_time() - start < 2)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "[] True", said.stdout + said.stderr


@pytest.mark.parametrize("spelling", ["absolute", "relative", "home", "trailing"])
def test_a_folder_may_be_written_in_every_usual_way(spelling: str, llama: Path, monkeypatch) -> None:
    monkeypatch.chdir(llama.parent)
    monkeypatch.setenv("HOME", str(llama.parent))
    name = {
        "absolute": str(llama), "relative": f"./{llama.name}", "home": f"~/{llama.name}", "trailing": f" {llama}/ ",
    }[spelling]  # fmt: skip
    assert open_checkpoint(name).parameters > 0
    assert open_checkpoint(llama.name).path == llama, "a name that exists as a folder is that folder"


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_file_of_the_checkpoint_opens_its_folder(llama: Path, file: str) -> None:
    opened = open_checkpoint(str(llama / file))
    assert opened.path == llama and opened.source == str(llama / file)


def test_a_shard_or_the_index_opens_the_whole(tmp_path: Path) -> None:
    tiny_models.save(tmp_path, "llama", max_shard_size="20KB")
    for file in (sorted(tmp_path.glob("model-*.safetensors"))[1], tmp_path / "model.safetensors.index.json"):
        assert open_checkpoint(str(file)).tensors == open_checkpoint(str(tmp_path)).tensors


def test_weights_that_would_not_be_loaded_are_not_taken_for_them(copy: Path) -> None:
    shutil.copy(copy / "model.safetensors", copy / "other.safetensors")
    refused(copy / "other.safetensors", "other.safetensors", "model.safetensors is what would be loaded")
    (copy / "config.json").unlink()
    refused(copy / "model.safetensors", "config.json")


@pytest.mark.parametrize("named", ["", "snapshots", "snapshots/" + "0" * 40])
def test_a_folder_of_the_hub_s_cache_opens_its_snapshot(llama: Path, tmp_path: Path, named: str) -> None:
    repo = tmp_path / "models--someone--model"
    for commit in ("0" * 40, "1" * 40):
        shutil.copytree(llama, repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert open_checkpoint(str(repo / named)).path == repo / "snapshots" / ("0" * 40)
    (repo / "refs" / "main").unlink()
    os.utime(repo / "snapshots" / ("1" * 40), (2**31, 2**31))
    assert open_checkpoint(str(repo)).path.name == "1" * 40, "without refs/main the newest one is meant"


def test_a_folder_of_the_hub_s_cache_without_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "models--someone--model").mkdir()
    refused(tmp_path / "models--someone--model", "without a snapshot", "someone/model")


# ---------------------------------------------------------------- quantized checkpoints are sources too


def _pack(folder: Path, bits: int, legacy: bool) -> int:
    """Rewrite a saved model in GPTQ's storage format (the values are of no matter here); logical parameters."""
    import torch
    from safetensors.torch import load_file, save_file

    weights, packed, parameters = load_file(folder / "model.safetensors"), {}, 0
    for name, tensor in weights.items():
        parameters += tensor.numel()
        if name.endswith("_proj.weight"):
            base, (rows, columns) = name.removesuffix(".weight"), tensor.shape
            packed[f"{base}.qweight"] = torch.zeros(columns * bits // 32, rows, dtype=torch.int32)
            packed[f"{base}.qzeros"] = torch.zeros(columns // 32, rows * bits // 32, dtype=torch.int32)
            packed[f"{base}.scales"] = torch.zeros(columns // 32, rows, dtype=torch.float16)
            packed[f"{base}.g_idx"] = torch.zeros(columns, dtype=torch.int32)
        else:
            packed[name] = tensor.half()
    (folder / "model.safetensors").unlink()
    method = {"bits": bits, "group_size": 32, "desc_act": False, "sym": True}
    if legacy:
        save_file(packed, folder / f"gptq_model-{bits}bit-32g.safetensors", {"format": "pt"})
        (folder / "quantize_config.json").write_text(json.dumps(method))
    else:
        save_file(packed, folder / "model.safetensors", {"format": "pt"})
        change_config(folder, quantization_config={**method, "quant_method": "gptq"})
    return parameters


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("legacy", [False, True], ids=["current", "autogptq"])
def test_gptq_checkpoints_count_unpacked(copy: Path, bits: int, legacy: bool) -> None:
    parameters = _pack(copy, bits, legacy)
    checkpoint = open_checkpoint(str(copy))
    assert checkpoint.parameters == parameters
    assert checkpoint.dtype == "fp16"
    assert checkpoint.quantization["quant_method"] == "gptq"
    assert checkpoint.quantization["bits"] == bits
    assert {"int32", "fp16"} == {t.dtype for t in checkpoint.tensors}


# ---------------------------------------------------------------- what is refused, and how


def test_pickles_are_refused_by_name(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    refused(copy, "pytorch_model.bin", "pickle", "save_pretrained")
    refused(copy / "pytorch_model.bin", "pytorch_model.bin", "safetensors")


def test_what_the_trainer_left_is_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "training_args.bin").write_bytes(b"x")
    refused(copy, "no weights", "model.safetensors")


def test_a_cut_off_file_is_named(copy: Path) -> None:
    file = copy / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    refused(copy, "model.safetensors", "truncated")
    file.write_bytes(data[:4])
    refused(copy, "model.safetensors", "damaged")
    file.write_bytes(b"")
    refused(copy, "model.safetensors", "damaged")
    file.write_bytes(data + b"more")
    refused(copy, "model.safetensors", "longer than its header")


@pytest.mark.parametrize(
    "header",
    [
        b"not json at all",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        b'{"a": {"dtype": "F32", "shape": ["x"], "data_offsets": [0, 8]}}',
        b'{"a": null}',
        b"[" * 50_000,
        b"\xff\xfe",
        b'{"a": {"dtype": "F32", "shape": ['
        + b",".join([b"9" * 4200] * 1000)
        + b'], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": ['
        + b",".join([b"9" * 18] * 200_000)
        + b'], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2' + b",1" * 2_000_000 + b'], "data_offsets": [0, 8]}}',
    ],
    ids=lambda header: header[:50].decode("latin1"),
)
def test_a_hostile_header_is_a_problem_and_nothing_else(copy: Path, header: bytes) -> None:
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    started_s = time.process_time()
    refused(copy, "model.safetensors", "damaged")
    assert time.process_time() - started_s < 5, (
        "numbers of the header were calculated with before they were checked"
    )


def test_a_header_that_claims_to_be_huge_is_not_read(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    refused(copy, "model.safetensors", "damaged")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin"])
def test_an_index_cannot_point_outside(copy: Path, outside: str) -> None:
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": outside}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, outside, "same folder")


def test_an_index_of_other_files(copy: Path) -> None:
    index = {
        "weight_map": {"model.embed_tokens.weight": "model.safetensors", "not.there": "model.safetensors"}
    }
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, "not.there", "do not belong together")
    (copy / "model.safetensors.index.json").write_text("{}")
    refused(copy, "index")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"architectures": ["BertForMaskedLM"], "model_type": "bert"}, ["encoder-only", "BertForMaskedLM"]),
        ({"architectures": ["BertLMHeadModel"], "model_type": "bert"}, ["encoder-only"]),
        ({"architectures": ["T5ForConditionalGeneration"], "model_type": "t5"}, ["seq2seq", "T5ForConditional"]),
        ({"architectures": ["BartForConditionalGeneration"], "model_type": "bart"}, ["seq2seq"]),
        ({"architectures": ["ViTForImageClassification"], "model_type": "vit"}, ["vision"]),
        ({"architectures": ["CLIPModel"], "model_type": "clip"}, ["vision"]),
        ({"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava"}, ["vision-language"]),
        ({"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}, ["speech"]),
        ({"architectures": ["Qwen2ForSequenceClassification"], "model_type": "qwen2"}, ["classifier"]),
        ({"architectures": ["LlamaModel"], "model_type": "llama"}, ["without a language-model head"]),
        ({"architectures": ["OwnForCausalLM"], "model_type": "own", "auto_map": {"AutoConfig": "own.Config"}},
         ["own python code", "trust_remote_code"]),
        ({"architectures": ["OwnForCausalLM"], "model_type": "own"}, ["does not know", "OwnForCausalLM"]),
        ({"model_type": ...}, ["model_type"]),
    ],
    ids=lambda v: v["architectures"][0] if isinstance(v, dict) and "architectures" in v else None,
)  # fmt: skip
def test_what_is_no_causal_lm_is_refused_by_what_it_is(copy: Path, config: dict, words: list[str]) -> None:
    change_config(copy, **config)
    refused(copy, *words)


def test_native_models_ignore_their_old_auto_map(copy: Path) -> None:
    change_config(copy, auto_map={"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"})
    assert open_checkpoint(str(copy)).architecture == "LlamaForCausalLM"


def test_a_decoder_of_an_encoder_family_is_accepted(copy: Path) -> None:
    change_config(copy, architectures=["BertLMHeadModel"], model_type="bert", is_decoder=True)
    assert open_checkpoint(str(copy)).architecture == "BertLMHeadModel"


def test_transformers_tables_are_read_without_importing_it() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from comparator.sources.architectures import _tables, causal_class_of

    assert _tables()["MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"] == dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert causal_class_of("llama") == "LlamaForCausalLM" and causal_class_of("t5") is None


def test_a_missing_tokenizer(copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    refused(copy, "tokenizer")
    (copy / "vocab.json").write_text("{}")
    refused(copy, "merges.txt")
    (copy / "merges.txt").write_text("")
    assert open_checkpoint(str(copy))


def test_a_sentencepiece_tokenizer_alone_names_the_library(copy: Path, monkeypatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "sentencepiece" else real(n, *a)
    )
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    refused(copy, "sentencepiece", "pip install")


def test_an_adapter_is_told_from_a_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "someone/base"}))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    refused(tmp_path, "adapter", "someone/base")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ([], ["no config.json"]),
        (["model.Q4_K_M.gguf"], ["GGUF", "model.Q4_K_M.gguf"]),
        (["params.json", "consolidated.00.pth"], ["original format"]),
        (["model_index.json"], ["diffusers"]),
    ],
)
def test_other_folders(tmp_path: Path, files: list[str], words: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"{}")
    refused(tmp_path, *words)


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"', "[" * 100_000, "\x00"])
def test_a_broken_config(copy: Path, text: str) -> None:
    (copy / "config.json").write_text(text)
    refused(copy, "config.json")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "no folder", "nowhere")
    (tmp_path / "notes.txt").write_text("x")
    refused(tmp_path / "notes.txt", "is a file")
