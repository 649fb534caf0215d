"""GGUF files as variants: which file a notation means, whether it is of the comparison's model, and making one."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_models

from comparator.backends import backend_for, offers, resolve
from comparator.backends.gguf import quantized_types, write
from comparator.core.errors import UserError
from comparator.sources import gguf_files, open_checkpoint
from comparator.sources.builtin import find_gguf
from comparator.sources.gguf_header import read_gguf

GGUF = backend_for(resolve("gguf"))
pytest.importorskip("xllamacpp", reason="requirements-llamacpp.txt is not installed")


def silent(fraction, message):
    pass


# ---------------------------------------------------------------- notation


def test_the_type_is_written_as_a_bare_word():
    assert resolve("gguf:q4_0").notation == "gguf:q4_0" and resolve("gguf:q8_0").notation == "gguf"
    assert [GGUF.bits(resolve(n)) for n in ("gguf", "gguf:q4_0", "gguf:bf16", "gguf@smollm2-135m")] == [
        8,
        4,
        16,
        4,
    ]
    assert GGUF.describe(resolve("gguf:q4_0")) == "Q4_0 made here, by llama.cpp"
    assert GGUF.describe(resolve("gguf@smollm2-135m")) == "a GGUF file as it is, by llama.cpp"
    with pytest.raises(UserError, match="no option “q3_9”") as caught:
        resolve("gguf:q3_9")
    assert all(kind in caught.value.advice for kind in write.TYPES)


def test_options_that_contradict_the_source_are_refused():
    with pytest.raises(UserError, match="its own types, so not q4_0"):
        resolve("gguf@smollm2-135m:q4_0")
    with pytest.raises(UserError, match="none is named"):
        resolve("gguf:file=Q4_K_M")


def test_the_file_that_a_model_comes_from_is_offered(tmp_path):
    assert offers("smollm2-135m") == ["gguf@smollm2-135m"]
    (tmp_path / "m.gguf").touch()
    assert offers(str(tmp_path / "m.gguf")) == [f"gguf@{tmp_path}/m.gguf"]
    assert offers(str(tmp_path)) == offers("user/model") == []


def test_without_the_library_the_command_is_named(monkeypatch):
    monkeypatch.setattr(type(GGUF), "requires", ("xllamacpp_that_is_not_there",))
    assert GGUF.unavailable().endswith("is not installed: pip install -r requirements-llamacpp.txt")
    assert (Path(__file__).parents[2] / "requirements-llamacpp.txt").is_file()


# ---------------------------------------------------------------- which file


def test_one_file_of_a_folder(tmp_path):
    for name in ("mmproj-model.gguf", "model-Q4_K_M.gguf", "notes.txt"):
        (tmp_path / name).touch()
    assert gguf_files.find(str(tmp_path), None, None, silent).name == "model-Q4_K_M.gguf"
    (tmp_path / "model-Q8_0.gguf").touch()
    assert gguf_files.find(str(tmp_path), None, "q8_0", silent).name == "model-Q8_0.gguf"
    with pytest.raises(UserError, match="2 GGUF files .* are possible") as caught:
        gguf_files.find(str(tmp_path), None, None, silent)
    assert f"gguf@{tmp_path}:file=model-Q4_K_M.gguf" in caught.value.advice
    with pytest.raises(UserError, match="no GGUF file named “Q2_K”"):
        gguf_files.find(str(tmp_path), None, "Q2_K", silent)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no GGUF file"):
        gguf_files.find(str(tmp_path / "empty"), None, None, silent)


def test_a_short_name_for_the_built_in_file():
    assert gguf_files.find("smollm2-135m", None, None, silent) == find_gguf()[0]


# ---------------------------------------------------------------- whether it fits


def test_the_models_own_file_fits(builtin):
    variant = resolve("gguf@smollm2-135m")
    assert GGUF.complete(variant, builtin, silent) == variant
    size = find_gguf()[0].stat().st_size
    assert size - 3e6 < GGUF.needed_bytes(variant, builtin) < size, "the file less its tokenizer"


def test_a_file_of_another_model_is_refused_by_name(builtin, two_layers):
    variant = resolve("gguf@smollm2-135m")
    with pytest.raises(UserError, match="smollm2-135m has num_hidden_layers 30; .* has 2"):
        GGUF.complete(variant, open_checkpoint(str(two_layers)), silent)
    with pytest.raises(UserError, match="is a LlamaForCausalLM; .* is a Qwen3ForCausalLM"):
        GGUF.complete(variant, replace(builtin, architecture="Qwen3ForCausalLM"), silent)
    GGUF.complete(
        variant, replace(builtin, architecture="MistralForCausalLM"), silent
    )  # one name in GGUF for both


def test_a_damaged_file_is_refused_before_llama_cpp_reads_it(two_layers, tmp_path):
    checkpoint = open_checkpoint(str(two_layers))
    whole = write.make(checkpoint, "q4_0", silent)
    (tmp_path / "cut.gguf").write_bytes(whole.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"cut.gguf is truncated"):
        GGUF.complete(resolve(f"gguf@{tmp_path}/cut.gguf"), checkpoint, silent)


def test_another_vocabulary_is_said(two_layers, builtin):
    header = read_gguf(write.make(open_checkpoint(str(two_layers)), "q4_0", silent))
    variant = resolve("gguf")
    assert GGUF.notes(variant, builtin, header) == []
    assert (
        "the entries beyond it are ignored"
        in GGUF.notes(variant, replace(builtin, vocab_size=49000), header)[0]
    )
    assert "divergence is not defined" in GGUF.notes(variant, replace(builtin, vocab_size=50000), header)[0]


# ---------------------------------------------------------------- making one


@pytest.mark.parametrize("kind", write.TYPES)
def test_a_made_file_has_its_type(two_layers, kind):
    checkpoint = open_checkpoint(str(two_layers))
    file = write.make(checkpoint, kind, silent)
    header = read_gguf(file)
    assert header.architecture == "llama" and header.of_model("block_count") == 2
    assert header.types["blk.0.ffn_down.weight"] == kind.removesuffix("_m").upper()
    assert header.types["output_norm.weight"] == "F32"
    assert header.types["token_embd.weight"] == (kind if write.TYPES[kind] >= 8 else "q8_0").upper()
    assert GGUF.notes(resolve(f"gguf:{kind}"), checkpoint, header) == [] or "_k" in kind
    estimated = sum(size for _, _, size in write.stored(checkpoint, kind))
    assert abs(estimated - file.stat().st_size) < 0.01 * file.stat().st_size
    assert write.make(checkpoint, kind, lambda *_: pytest.fail("it is in the cache")) == file


def test_the_mix_of_k_quants_is_that_of_llama_quantize(two_layers, builtin):
    """src/llama-quant.cpp: values and down projections of the first and last eighth of the layers and of each third between
    them have 6 bits; rows of no multiple of 256 values fall back to types of blocks of 32."""
    recipe = write.Recipe(builtin, "q4_k_m")
    more = [
        i for i in range(30) if recipe.stored(f"model.layers.{i}.mlp.down_proj.weight", (576, 1536)) == "q6_k"
    ]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    assert recipe.stored("model.layers.0.self_attn.v_proj.weight", (192, 576)) == "q8_0"
    assert recipe.stored("model.layers.3.self_attn.v_proj.weight", (192, 576)) == "q5_0"
    assert recipe.stored("model.embed_tokens.weight", (49152, 1024)) == "q6_k", "it is the head too"
    whole = write.Recipe(replace(builtin, tied=False), "q5_k_m")
    assert whole.stored("model.embed_tokens.weight", (49152, 1024)) == "q5_k"
    assert whole.stored("lm_head.weight", (49152, 1024)) == "q6_k"
    checkpoint, variant = open_checkpoint(str(two_layers)), resolve("gguf:q4_k_m")
    (note,) = GGUF.notes(variant, checkpoint, read_gguf(GGUF.file(variant, checkpoint)))
    assert "not a multiple of 256" in note and "Q5_0, Q8_0" in note


def test_ggmls_rows_are_those_of_the_gguf_library():
    import gguf
    import numpy as np

    from comparator.backends.gguf.quantizer import Quantizer

    weight = np.random.default_rng(0).standard_normal((5, 64)).astype(np.float32)
    with Quantizer() as quantize:
        for name in ("Q8_0", "Q5_1", "Q4_0"):
            number = gguf.GGMLQuantizationType[name]
            assert (quantize(weight, number) == gguf.quants.quantize(weight, number)).all()
        with pytest.raises(UserError, match="process that quantizes for GGUF ended"):
            quantize(weight, gguf.GGMLQuantizationType.IQ1_S)  # it asserts an importance matrix
        with pytest.raises(UserError, match="ended"):
            quantize(weight, number)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "llama 3"])
def test_llama_cpp_gives_the_logits_of_each_family(family, tmp_path, own_dirs):
    import threading

    import numpy as np
    import torch

    pytest.importorskip("xllamacpp", reason="requirements-llamacpp.txt is not installed")
    from comparator.runtimes.llama_cpp.child import Child

    scaling = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 32}  # fmt: skip
    changes = {"mistral": {"sliding_window": None}, "llama 3": {"rope_parameters": scaling}}.get(family, {})
    # Large weights: attention then depends on positions, and a wrong rotation is a quarter of the logits.
    model = tiny_models.save(tmp_path / family, family.partition(" ")[0], initializer_range=0.1, **changes)
    checkpoint, ids, never = open_checkpoint(str(tmp_path / family)), list(range(5, 45)), threading.Event()
    with torch.inference_mode():
        reference = model(torch.tensor([ids])).logits[0].numpy()
    child = Child(family)
    try:
        child.open(write.make(checkpoint, "f16", silent), None, 1, lambda: None)
        child.ask("use", len(ids), len(ids))
        child.feed(ids, never, every=True)
        logits = np.empty_like(reference)
        child.copy_logits(logits, 0)
    finally:
        child.close()
    assert np.abs(logits - reference).max() < 0.01 * np.abs(reference).max(), (
        f"{family} is written in another order"
    )


def test_what_is_not_written_is_refused_with_a_way_out(builtin, tmp_path):
    with pytest.raises(UserError, match="No GGUF is made here of a BloomForCausalLM") as caught:
        write.check(replace(builtin, architecture="BloomForCausalLM"))
    assert "gguf@" in caught.value.advice
    (tmp_path / "config.json").write_text('{"rope_parameters": {"rope_type": "yarn"}}')
    with pytest.raises(UserError, match="rotary embeddings of the type yarn"):
        write.check(replace(builtin, path=tmp_path))


def test_stop_leaves_nothing_behind(two_layers, own_dirs):
    from comparator.core.errors import Stopped

    def stop(fraction, message):
        if fraction and fraction > 0.5:
            raise Stopped

    with pytest.raises(Stopped):
        write.make(open_checkpoint(str(two_layers)), "q4_0", stop)
    assert not list((own_dirs / "cache").rglob("*.gguf"))


def test_the_names_of_ggmls_types_are_the_librarys():
    import gguf

    assert set(quantized_types()) <= set(gguf.GGMLQuantizationType.__members__)
    assert "gguf" not in sys.modules or quantized_types()["Q4_K"].bits == 4


# ---------------------------------------------------------------- the Hub


@pytest.fixture
def hub_with_files(own_dirs, monkeypatch):
    from model_hub import as_the_hub

    with as_the_hub(own_dirs / "hf", monkeypatch) as stand_in:
        stand_in.add(
            "user/model-GGUF",
            {"m-Q4_K_M.gguf": b"four" * 100, "m-Q8_0.gguf": b"eight" * 100, "README.md": b"hi"},
        )
        yield stand_in


def test_one_file_of_a_hub_repo_is_downloaded_alone(hub_with_files, monkeypatch):
    from comparator.sources import hub

    file = gguf_files.find("user/model-GGUF", None, "q4_k", silent)
    assert file.read_bytes() == b"four" * 100 and [p.name for p in file.parent.iterdir()] == ["m-Q4_K_M.gguf"]
    with pytest.raises(
        UserError, match="2 GGUF files of user/model-GGUF are possible: m-Q4_K_M.gguf, m-Q8_0.gguf"
    ):
        gguf_files.find("user/model-GGUF", None, None, silent)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers there
    hub._listings.clear()
    assert gguf_files.find("user/model-GGUF", None, "q4_k", silent) == file, "it was downloaded before"


def test_a_public_installation_takes_from_the_hub_what_is_allowed(hub_with_files, settings_env):
    settings_env(public=True)
    with pytest.raises(UserError, match="public installation does not run GGUF files from the Hub"):
        gguf_files.find("user/model-GGUF", None, "q4_k", silent)
    assert gguf_files.find("smollm2-135m", None, None, silent) == find_gguf()[0]
    settings_env(public=True, allowed_models="user/*")
    assert gguf_files.find("user/model-GGUF", None, "q4_k", silent).name == "m-Q4_K_M.gguf"
