"""A checkpoint whose weights are not all there is refused by name; one that is whole is never refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models

from comparator.core.errors import UserError
from comparator.sources import open_checkpoint
from comparator.sources.examine import check_loaded, examine, require_complete

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
SIZES = {
    "vocab_size": tiny_models.VOCABULARY, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 1,
}  # fmt: skip
# Experts that are stored one by one and loaded merged, weights that are renamed, and what may be missing.
CONVERTED = {
    "mixtral": {}, "qwen2_moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "num_experts": 4},
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 4, "head_dim": 16}, "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 16}, "phi3": {}, "gemma3_text": {"head_dim": 16}, "falcon": {},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
                    "moe_intermediate_size": 64, "q_lora_rank": 16, "kv_lora_rank": 16},
    "jamba": {}, "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1}, "llama4_text": {"num_local_experts": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save(folder, "llama", dtype="bfloat16", tie_word_embeddings=False)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def change(folder: Path, tensors=None, **config) -> Path:
    """Pass the tensors of a folder through `tensors(dict) -> dict`, and change its config.json."""
    from safetensors.torch import load_file, save_file

    if tensors is not None:
        changed = tensors(load_file(folder / "model.safetensors"))
        save_file(
            {n: t.contiguous() for n, t in changed.items()}, folder / "model.safetensors", {"format": "pt"}
        )
    values = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return folder


def refused(folder: Path, *words: str) -> UserError:
    with pytest.raises(UserError) as caught:
        require_complete(open_checkpoint(str(folder)))
    assert caught.value.advice
    for word in words:
        assert word in str(caught.value), f"“{word}” is missing from: {caught.value}"
    return caught.value


# ---------------------------------------------------------------- what is whole passes


@pytest.mark.parametrize("tied", [None, True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_complete(family: str, tied: bool | None, tmp_path: Path) -> None:
    tiny_models.save(
        tmp_path, family, dtype="bfloat16", **({} if tied is None else {"tie_word_embeddings": tied})
    )
    result = examine(open_checkpoint(str(tmp_path)))
    assert result.problem is None and not result.left_over
    assert result.line == f"examined: complete, {result.tensors} tensors, bf16"


@pytest.mark.parametrize("family", CONVERTED)
def test_weights_that_transformers_converts_are_no_false_alarm(family: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **SIZES, **CONVERTED[family])
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    result = examine(open_checkpoint(str(tmp_path)))
    assert result.problem is None and not result.left_over, result.line


def test_long_contexts_and_numbers_that_stand_for_none_are_no_false_alarm(copy: Path) -> None:
    more = {
        "n_positions": 10**7,
        "n_ctx": 10**7,
        "max_position_embeddings": 10**7,
        "num_experts": -1,
        "rope_theta": 10**8,
    }
    require_complete(open_checkpoint(str(change(copy, **more))))


def test_the_built_in_model_is_complete(builtin) -> None:
    assert examine(builtin).line == f"examined: complete, {len(builtin.tensors)} tensors, bf16"


def test_what_was_examined_keeps_no_lent_tensors_alive(llama: Path) -> None:
    import gc
    import weakref
    from dataclasses import replace

    class Lent:
        pass

    lent = Lent()
    examine(replace(open_checkpoint(str(llama)), source="lent", lent=lent))
    gone = weakref.ref(lent)
    del lent
    gc.collect()
    assert gone() is None, "the weights of an unloaded variant would stay in memory"


def test_a_head_that_is_stored_twice_and_names_without_their_prefix(tmp_path: Path) -> None:
    tiny_models.save(tmp_path, "llama", tie_word_embeddings=True)
    change(tmp_path, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})
    require_complete(open_checkpoint(str(tmp_path)))
    change(tmp_path, lambda t: {n.removeprefix("model."): x for n, x in t.items() if n != "lm_head.weight"})
    require_complete(open_checkpoint(str(tmp_path)))


def test_what_is_left_over_is_named(copy: Path) -> None:
    import torch

    change(copy, lambda t: t | {"value_head.weight": torch.ones(1, 32)})
    result = require_complete(open_checkpoint(str(copy)))
    assert result.left_over == ("value_head.weight",) and "value_head.weight" in result.line
    assert (
        require_complete(open_checkpoint(str(change(copy, num_hidden_layers=1))))
        .left_over[0]
        .startswith("model.layers.1.")
    )


# ---------------------------------------------------------------- what is missing is refused, with the cause


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model.", "model._orig_mod."])
def test_a_foreign_prefix(copy: Path, prefix: str) -> None:
    change(copy, lambda t: {prefix + n: x for n, x in t.items()})
    refused(copy, "21 of the weights", "lm_head.weight", f"“{prefix}”")


def test_a_compiled_part(copy: Path) -> None:
    change(copy, lambda t: {n.replace("model.", "model._orig_mod.", 1): x for n, x in t.items()})
    refused(copy, "_orig_mod", "of the weights")


def test_a_head_that_is_not_there(copy: Path) -> None:
    change(copy, lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"})
    refused(copy, "1 of the weights", "lm_head.weight", "tie_word_embeddings")


def test_a_layer_that_is_not_there(copy: Path) -> None:
    change(copy, lambda t: {n: x for n, x in t.items() if ".layers.1." not in n})
    refused(copy, "9 of the weights", "model.layers.1.", "layer 1")


def test_one_expert_that_is_not_there(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SIZES)).to(
        torch.bfloat16
    ).save_pretrained(tmp_path)
    tiny_models.tokenizer().save_pretrained(tmp_path)
    change(
        tmp_path, lambda t: {n: x for n, x in t.items() if ".experts.3." not in n or ".layers.1." not in n}
    )
    refused(tmp_path, "experts")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 4000}, ["4,000 layers", "contain 2"]),
        ({"num_hidden_layers": 60}, ["of the weights", "model.layers."]),
        ({"num_hidden_layers": 10**12}, ["num_hidden_layers"]),
        ({"vocab_size": 20_000_000}, ["vocab_size=20000000"]),
        ({"vocab_size": 321}, ["different shape", "(320, 32)", "(321, 32)"]),
        ({"hidden_size": 64}, ["different shape"]),
        ({"hidden_size": 10**9}, ["hidden_size"]),
        ({"intermediate_size": -2}, ["intermediate_size"]),
        ({"num_key_value_heads": 4}, ["different shape", "k_proj"]),
        ({"num_attention_heads": 0}, ["transformers cannot build"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_another_model(copy: Path, config: dict, words: list[str]) -> None:
    refused(change(copy, **config), *words)


def test_a_model_that_is_larger_than_its_files_is_not_built(copy: Path, monkeypatch) -> None:
    """Numbers that pass one by one and are too much together."""
    from comparator.sources import consistency

    monkeypatch.setattr(consistency, "check", lambda *_: None)
    refused(
        change(copy, num_hidden_layers=30_000, layer_types=None),
        "larger model",
        "30,000 layers, the files contain 2",
    )
    refused(change(copy, num_hidden_layers=2, vocab_size=10**9), "larger model", "1000000000")


# ---------------------------------------------------------------- quantized, or not


def packed(tensors: dict) -> dict:
    """As GPTQ stores it; the values are of no matter here."""
    import torch

    made = {}
    for name, tensor in tensors.items():
        stem, (rows, columns) = name.removesuffix(".weight"), (*tensor.shape, 1)[:2]
        if not name.endswith("_proj.weight"):
            made[name] = tensor
            continue
        made |= {f"{stem}.qweight": torch.ones(columns // 8, rows, dtype=torch.int32),
                 f"{stem}.qzeros": torch.ones(max(columns // 32, 1), rows // 8, dtype=torch.int32),
                 f"{stem}.scales": torch.ones(max(columns // 32, 1), rows, dtype=torch.float16),
                 f"{stem}.g_idx": torch.zeros(columns, dtype=torch.int32)}  # fmt: skip
    return made


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True}


def test_a_config_that_says_quantized_over_plain_weights(copy: Path) -> None:
    refused(change(copy, quantization_config=GPTQ), "gptq", "bf16", "qweight")
    bits = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    refused(change(copy, quantization_config=bits), "bitsandbytes", "bf16")
    refused(change(copy, quantization_config={"quant_method": "fp8"}), "fp8", "bf16")


def test_packed_weights_without_a_config(copy: Path) -> None:
    refused(change(copy, packed), "qweight", "quantization_config")
    require_complete(open_checkpoint(str(change(copy, quantization_config=GPTQ))))


def test_packed_weights_lack_a_layer(copy: Path) -> None:
    change(
        copy,
        lambda t: {n: x for n, x in packed(t).items() if ".layers.1." not in n},
        quantization_config=GPTQ,
    )
    refused(copy, "9 of the weights", "layer 1")


def test_float8_without_a_config(copy: Path) -> None:
    import torch

    def cast(tensors: dict, scales: bool) -> dict:
        made = {n: t.to(torch.float8_e4m3fn) if "_proj" in n else t for n, t in tensors.items()}
        return made | ({n + "_scale_inv": torch.ones(1, 1) for n in made if "_proj" in n} if scales else {})

    refused(change(copy, lambda t: cast(t, False)), "fp8_e4m3", "quantization_config")
    refused(change(copy, lambda t: cast(t, True)), "weight_scale_inv", "quantization_config")
    require_complete(open_checkpoint(str(change(copy, quantization_config={"quant_method": "fp8"}))))


def test_a_quantized_head_that_the_model_does_not_take(copy: Path) -> None:
    import torch

    change(copy, lambda t: t | {"lm_head.qweight": torch.ones(4, 320, dtype=torch.int32)})
    refused(copy, "lm_head.qweight", "quantization_config")


def test_what_loading_left_out_is_refused_too() -> None:
    """The second wall: what transformers says after it has loaded."""
    info = {"missing_keys": {"lm_head.weight"}, "unexpected_keys": set(), "mismatched_keys": set()}
    with pytest.raises(UserError, match="lm_head.weight"):
        check_loaded("x", info)


@pytest.mark.parametrize("model_type", ("gptj", "ctrl"))
def test_tables_by_a_number_of_the_config_alone_are_not_allocated(tmp_path, model_type):
    """Sines for 50 million positions: gigabytes over a file of some kB, while the weights were loaded."""
    values = {"vocab_size": 320, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    values |= {"rotary_dim": 4} if model_type == "gptj" else {"dff": 64}
    tiny_models.save_config(tmp_path / "model", model_type, values)
    assert require_complete(open_checkpoint(str(tmp_path / "model"))).problem is None
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"n_positions": 50_000_000}))
    with pytest.raises(UserError, match="larger model than its files contain"):
        require_complete(open_checkpoint(str(tmp_path / "model")))
