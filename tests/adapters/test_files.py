"""Finding, describing and judging adapters from their files alone: no torch, no model weights."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from comparator import adapters
from comparator.adapters.locate import builtin_path
from comparator.backends import resolve
from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.core.variant import Adapter, Cell, parse_adapter

WIDTH, RANK = 576, 4  # of the built-in model, and of what these tests write


def lora(
    folder: Path, shapes: dict[str, tuple[int, int]], whole: dict[str, tuple] | None = None, **config
) -> Path:
    """An adapter folder: `shapes` maps a module to (inputs, outputs), `whole` a tensor to its shape."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for module, (inputs, outputs) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = np.ones((RANK, inputs), np.float32)
        tensors[f"base_model.model.{module}.lora_B.weight"] = np.ones((outputs, RANK), np.float32)
    for name, shape in (whole or {}).items():
        tensors[f"base_model.model.{name}"] = np.ones(shape, np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    written = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(written))
    return folder


def q_proj(layer: int = 0) -> str:
    return f"model.layers.{layer}.self_attn.q_proj"


def problem_of(folder: Path | str, builtin, variant: str = "bf16", **adapter) -> str:
    with pytest.raises(UserError) as caught:
        adapters.plan(Adapter(str(folder), **adapter), builtin, resolve(variant))
    assert caught.value.advice, "every problem names a way out"
    return str(caught.value)


# ---------------------------------------------------------------- the built-in one


def test_pirate_is_described_as_it_is(builtin):
    facts = adapters.describe(adapters.open_adapter(parse_adapter("pirate")))
    assert (facts.kind, facts.ranks, facts.alpha, facts.scaling) == ("LoRA", (4,), 8.0, 2.0)
    assert facts.targets == ("down_proj", "q_proj", "up_proj", "v_proj")
    assert facts.modules == 120
    # Independently: r × (in + out) of the four layers of each of the 30 blocks.
    per_block = 4 * ((576 + 576) + (576 + 192) + (576 + 1536) + (1536 + 576))
    assert facts.parameters == 30 * per_block
    assert facts.share(builtin.parameters) == pytest.approx(
        facts.parameters / (134_515_008 + facts.parameters)
    )
    assert adapters.check_fit(facts, builtin) == [], (
        "pirate was trained on this model; no warning belongs here"
    )


def test_pirate_is_at_most_two_megabytes():
    size = sum(f.stat().st_size for f in builtin_path("pirate").iterdir())
    assert size <= 2e6, f"{size / 1e6:.2f} MB"


def test_share_is_what_peft_prints(builtin):
    peft = pytest.importorskip("peft")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(builtin.path))
    config = peft.PeftConfig.from_pretrained(str(builtin_path("pirate")))
    config.inference_mode = False
    trainable, total = peft.get_peft_model(model, config).get_nb_trainable_parameters()
    facts = adapters.describe(adapters.open_adapter(parse_adapter("pirate")))
    assert facts.parameters == trainable
    assert facts.share(builtin.parameters) == pytest.approx(trainable / total)


def test_describing_needs_neither_torch_nor_peft():
    code = (
        "import sys; from comparator import adapters; from comparator.types import Adapter;"
        "adapters.describe(adapters.open_adapter(Adapter('pirate')));"
        "sys.exit(', '.join({'torch', 'peft', 'transformers'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path.cwd())
    assert done.returncode == 0, f"imported {done.stderr}"


# ---------------------------------------------------------------- what it is


def test_ranks_come_from_the_tensors(tmp_path):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)}, r=64, rank_pattern={"q_proj": 4})
    facts = adapters.describe(adapters.open_adapter(Adapter(str(folder))))
    assert facts.ranks == (4,), "the config's r holds only where rank_pattern says nothing else"


@pytest.mark.parametrize(
    ("config", "kind", "scaling"),
    [
        ({}, "LoRA", 2.0),
        ({"use_rslora": True}, "rsLoRA", 4.0),
        ({"use_dora": True}, "DoRA", 2.0),
    ],
)
def test_kind_and_scaling(tmp_path, config, kind, scaling):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)}, **config)
    facts = adapters.describe(adapters.open_adapter(Adapter(str(folder))))
    assert (facts.kind, facts.scaling) == (kind, scaling)


def test_another_base_model_name_is_a_note_not_a_refusal(tmp_path, builtin):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)}, base_model_name_or_path="someone/Other-135M")
    plan = adapters.plan(Adapter(str(folder)), builtin, resolve("bf16"))
    assert any("someone/Other-135M" in note and "smollm2-135m" in note for note in plan.notes)


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M-Instruct", "/models/SmolLM2-135M-Instruct/"])
def test_the_original_name_of_the_built_in_model_is_no_other_model(tmp_path, builtin, name):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)}, base_model_name_or_path=name)
    assert adapters.plan(Adapter(str(folder)), builtin, resolve("bf16")).notes == ()


def test_a_name_before_the_layers_may_differ(tmp_path, builtin):
    folder = lora(tmp_path / "a", {"transformer.layers.0.self_attn.q_proj": (WIDTH, WIDTH)})
    adapters.check_fit(adapters.describe(adapters.open_adapter(Adapter(str(folder)))), builtin)


# ---------------------------------------------------------------- what does not fit


def test_another_size_names_the_first_module(tmp_path, builtin):
    folder = lora(
        tmp_path / "a",
        {q_proj(0): (WIDTH, WIDTH), q_proj(1): (960, 960)},
        base_model_name_or_path="someone/SmolLM2-360M",
    )
    said = problem_of(folder, builtin)
    assert q_proj(1) in said and "576" in said and "960" in said and "someone/SmolLM2-360M" in said


def test_output_features_are_checked_too(tmp_path, builtin):
    said = problem_of(lora(tmp_path / "a", {q_proj(0): (WIDTH, 192)}), builtin)
    assert "output features" in said and "192" in said


def test_more_layers_than_the_model_has(tmp_path, builtin):
    said = problem_of(lora(tmp_path / "a", {q_proj(0): (WIDTH, WIDTH), q_proj(30): (WIDTH, WIDTH)}), builtin)
    assert q_proj(30) in said and "has no" in said


def test_another_architecture(tmp_path, builtin):
    said = problem_of(lora(tmp_path / "a", {"transformer.h.0.attn.c_attn": (768, 2304)}), builtin)
    assert "transformer.h.0.attn.c_attn" in said and "LlamaForCausalLM" in said


def test_added_tokens_are_refused_with_their_number(tmp_path, builtin):
    folder = lora(
        tmp_path / "a",
        {q_proj(): (WIDTH, WIDTH)},
        whole={"model.embed_tokens.weight": (builtin.vocab_size + 3, WIDTH)},
        modules_to_save=["embed_tokens"],
    )
    said = problem_of(folder, builtin)
    assert "adds 3 token" in said and f"{builtin.vocab_size:,}" in said


def test_added_tokens_in_the_lora_of_an_embedding(tmp_path, builtin):
    folder = tmp_path / "a"
    lora(folder, {})
    save_file(
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": np.ones(
                (RANK, builtin.vocab_size + 2), np.float32
            ),
            "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((WIDTH, RANK), np.float32),
        },
        folder / "adapter_model.safetensors",
    )
    assert "adds 2 token" in problem_of(folder, builtin)


def test_a_smaller_embedding_is_another_model_not_added_tokens(tmp_path, builtin):
    whole = {"model.embed_tokens.weight": (32_000, WIDTH)}
    folder = lora(tmp_path / "a", {}, whole=whole, modules_to_save=["embed_tokens"])
    said = problem_of(folder, builtin)
    assert "32,000" in said and "adds" not in said


@pytest.mark.parametrize(
    "task", ["SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"]
)
def test_encoder_adapters_are_refused_by_task(tmp_path, builtin, task):
    said = problem_of(lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)}, task_type=task), builtin)
    assert task in said and "causal" in said


def test_a_pickle_is_refused_by_name(tmp_path, builtin):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)})
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.bin" in problem_of(folder, builtin)


def test_a_missing_config(tmp_path, builtin):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)})
    (folder / "adapter_config.json").unlink()
    assert "adapter_config.json" in problem_of(folder, builtin)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"r": 4}', '{"peft_type": 3}'])
def test_a_broken_config(tmp_path, builtin, text):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)})
    (folder / "adapter_config.json").write_text(text)
    assert "adapter_config.json" in problem_of(folder, builtin)


def test_a_truncated_file(tmp_path, builtin):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)})
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "damaged" in problem_of(folder, builtin)


def test_a_whole_model_is_no_adapter(builtin):
    assert "whole model" in problem_of(builtin.path, builtin)


def test_a_folder_that_is_not_there(tmp_path, builtin):
    assert "no folder" in problem_of(tmp_path / "nothing", builtin)


def test_a_misspelt_built_in_name(builtin):
    assert "Did you mean pirate" in problem_of("pirat", builtin)


def test_public_mode_reads_no_folders(tmp_path):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)})
    with pytest.raises(UserError, match="public"):
        adapters.open_adapter(Adapter(str(folder)), settings=Settings(public=True))


@pytest.mark.parametrize("key", ["megatron_config", "alora_invocation_tokens", "arrow_config"])
def test_what_needs_more_than_a_model_is_refused_by_name(tmp_path, builtin, key):
    assert key in problem_of(lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)}, **{key: [1]}), builtin)


# ---------------------------------------------------------------- which base it gets


def test_gptq_refuses_a_merge_with_the_reason(builtin):
    assert "quantizing the layer" in problem_of("pirate", builtin, "gptq", merged=True)


def test_prompt_tuning_has_nothing_to_merge_and_no_strength(tmp_path, builtin):
    folder = tmp_path / "p"
    lora(folder, {}, peft_type="PROMPT_TUNING", num_virtual_tokens=2)
    save_file({"prompt_embeddings": np.ones((2, WIDTH), np.float32)}, folder / "adapter_model.safetensors")
    assert "virtual tokens" in problem_of(folder, builtin, merged=True)
    assert "cannot be scaled" in problem_of(folder, builtin, scale=0.5)


def test_virtual_tokens_of_another_width(tmp_path, builtin):
    folder = tmp_path / "p"
    lora(folder, {}, peft_type="PROMPT_TUNING", num_virtual_tokens=2)
    save_file({"prompt_embeddings": np.ones((2, 960), np.float32)}, folder / "adapter_model.safetensors")
    assert "960" in problem_of(folder, builtin)


def test_what_writes_into_the_base_gets_one_of_its_own(tmp_path, builtin):
    def private(name: str, **config) -> str | None:
        folder = lora(tmp_path / name, {q_proj(): (WIDTH, WIDTH)}, **config)
        return adapters.plan(Adapter(str(folder)), builtin, resolve("bf16")).private

    assert private("plain") is None
    assert private("gaussian", init_lora_weights="gaussian") is None
    assert "pissa" in private("pissa", init_lora_weights="pissa")
    assert "bias" in private("bias", bias="lora_only")


def test_an_unchanged_embedding_beside_the_adapter_is_left_out(tmp_path, builtin):
    """peft saves the embedding with an adapter that targets it: 57 MB that change nothing."""
    from safetensors.torch import load_file
    from safetensors.torch import save_file as save

    embedding = load_file(builtin.path / "model.safetensors")["model.embed_tokens.weight"]
    name = "base_model.model.model.embed_tokens.weight"
    for number, (tensor, shared) in enumerate(
        [
            (embedding, True),
            (embedding.float(), True),
            (embedding.float() * 1.001, False),
            (embedding + 0.25, False),
        ]
    ):
        folder = lora(tmp_path / str(number), {q_proj(): (WIDTH, WIDTH)})
        file = folder / "adapter_model.safetensors"
        save({**load_file(file), name: tensor.contiguous()}, file)
        plan = adapters.plan(Adapter(str(folder)), builtin, resolve("bf16"))
        assert (plan.private is None) == shared, f"case {number}"
        assert (name in plan.left_out) == shared


def test_the_same_adapter_twice_under_two_spellings(tmp_path, monkeypatch):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)})
    monkeypatch.chdir(tmp_path)
    one, other = (Cell(resolve("bf16"), Adapter(text)) for text in ("./a", str(folder)))
    assert adapters.same_twice([one, other]) == other.label
    assert adapters.same_twice([one, Cell(resolve("nf4"), Adapter(str(folder)))]) is None
    assert adapters.same_twice([one, Cell(resolve("bf16"), Adapter(str(folder), scale=0.5))]) is None


def test_a_file_that_was_replaced_is_another_adapter(tmp_path, builtin):
    folder = lora(tmp_path / "a", {q_proj(): (WIDTH, WIDTH)})
    before = adapters.plan(Adapter(str(folder)), builtin, resolve("bf16")).key
    shutil.rmtree(folder)
    lora(folder, {q_proj(): (WIDTH, WIDTH), q_proj(1): (WIDTH, WIDTH)})
    assert adapters.plan(Adapter(str(folder)), builtin, resolve("bf16")).key != before
