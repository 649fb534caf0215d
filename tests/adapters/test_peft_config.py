"""Adapters as people have them, on a loaded model: none has an effect of exactly 0 without a word."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import tiny_models

from comparator import adapters
from comparator.adapters import attach
from comparator.backends import backend_for, resolve
from comparator.backends.base import Placement
from comparator.core.errors import UserError
from comparator.core.variant import Adapter
from comparator.sources import open_checkpoint

WIDTH, VALUES = 576, 192  # of the built-in model: what q_proj and v_proj give
Q = "model.layers.{}.self_attn.q_proj"
BOTH = {Q.format(n): (4, WIDTH, WIDTH) for n in range(2)}


@pytest.fixture(scope="module")
def checkpoint(two_layers):
    return open_checkpoint(str(two_layers))


@pytest.fixture(scope="module")
def model(checkpoint):
    variant = resolve("fp32")
    return backend_for(variant).load(checkpoint, variant, Placement("cpu"), lambda *_: None).model


def logits(model):
    import torch

    with torch.inference_mode():
        return model(torch.tensor([[50, 35, 282, 260]])).logits[0]


@pytest.fixture
def lora(tmp_path, checkpoint):
    """`lora({module: (rank, inputs, outputs)}, **config)` → its plan on the two-layer model."""

    def make(
        modules: dict,
        *,
        on=checkpoint,
        loud: float = 0.3,
        merged: bool = False,
        prefix="base_model.model.",
        **config,
    ):
        import torch
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(0)
        tensors = {}
        for module, (rank, inputs, outputs) in modules.items():
            own = f"{prefix}{module}.lora_"
            tensors[f"{own}A.weight"] = torch.randn(rank, inputs, generator=generator) * 0.3
            tensors[f"{own}B.weight"] = torch.randn(outputs, rank, generator=generator) * loud
        folder: Path = tmp_path / "lora"
        folder.mkdir(exist_ok=True)
        save_file(tensors, folder / "adapter_model.safetensors")
        written = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj"],
        }
        (folder / "adapter_config.json").write_text(json.dumps(written | config))
        return adapters.plan(Adapter(str(folder), merged=merged), on, resolve("fp32"))

    return make


def effect(model, plan) -> tuple[float, tuple[str, ...]]:
    """(how far the adapter moves the logits, its notes)."""
    fitted = attach.fit(model, backend_for(resolve("fp32")), plan)
    before = logits(model)
    with attach.worn(fitted):
        moved = float((logits(model) - before).abs().max())
    assert float((logits(model) - before).abs().max()) == 0, "the base is not as it was"
    return moved, plan.notes + fitted.notes


def test_another_prefix_is_put_where_it_belongs(model, lora):
    plain, notes = effect(model, lora(BOTH))
    assert plain > 0.01 and not notes
    other = {name.replace("model.", "model.language_model.", 1): size for name, size in BOTH.items()}
    moved, notes = effect(model, lora(other, target_modules=r".*language_model.*q_proj"))
    assert moved == plain, "the same tensors do the same"
    assert "language_model" in " ".join(notes)
    assert effect(model, lora(BOTH, prefix=""))[0] == plain, "saved without peft's prefix"


def test_each_module_keeps_its_own_rank_and_alpha(model, lora):
    import torch
    from peft import PeftModel

    modules = {Q.format(0): (4, WIDTH, WIDTH), Q.format(1): (2, WIDTH, WIDTH),
               "model.layers.0.self_attn.v_proj": (8, WIDTH, VALUES)}  # fmt: skip
    plan = lora(
        modules, target_modules=r"model\.layers\.(0\.self_attn\.[qv]|1\.self_attn\.q)_proj",
        rank_pattern={r"layers\.1\..*": 2, "v_proj": 8}, alpha_pattern={r".*\.v_proj": 32},
    )  # fmt: skip
    assert plan.facts.ranks == (2, 4, 8)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(model), str(plan.facts.files.path)).eval()
    fitted = attach.fit(model, backend_for(resolve("fp32")), plan)
    with attach.worn(fitted):
        assert torch.equal(logits(model), logits(wrapped)), "not what peft gives for the patterns"


@pytest.mark.parametrize("experts", [False, True])
def test_a_module_that_the_model_lacks_is_named(model, lora, experts):
    extra = "model.layers.1.mlp.experts.0.w1" if experts else "model.layers.1.self_attn.kv_proj"
    plan = lora(BOTH | {extra: (4, WIDTH, WIDTH)}, target_modules=["q_proj", "kv_proj", "w1"])
    with pytest.raises(UserError, match=extra.replace(".", r"\.")):
        attach.fit(model, backend_for(resolve("fp32")), plan)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """(checkpoint, model) of a tiny Mixtral, whose files hold single experts and whose model one parameter for all."""
    folder = tmp_path_factory.mktemp("mixtral")
    tiny_models.save(folder, "mixtral")
    checkpoint, variant = open_checkpoint(str(folder)), resolve("fp32")
    return checkpoint, backend_for(variant).load(checkpoint, variant, Placement("cpu"), lambda *_: None).model


def experts(*parts: str) -> dict:
    sizes = {"w1": (4, 32, 256), "w2": (4, 256, 32), "w3": (4, 32, 256)}
    name = "model.layers.{}.block_sparse_moe.experts.{}.{}"
    return {name.format(n, e, part): sizes[part] for n in range(2) for e in range(4) for part in parts}


def test_adapters_of_single_experts_reach_the_fused_ones(mixture, lora):
    import torch
    from safetensors.torch import load_file

    checkpoint, model = mixture
    plan = lora(experts("w1", "w2", "w3"), on=checkpoint, target_modules=["w1", "w2", "w3"])
    assert plan.facts.ranks == (4,), "the rank of one expert"
    tensors = load_file(plan.facts.files.path / "adapter_model.safetensors")
    changed = copy.deepcopy(model)

    def update(layer: int, expert: int, part: str):
        own = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.lora_"
        return 2.0 * tensors[f"{own}B.weight"] @ tensors[f"{own}A.weight"]

    for n in range(2):
        fused = changed.model.layers[n].mlp.experts
        for e in range(4):
            fused.gate_up_proj.data[e] += torch.cat([update(n, e, "w1"), update(n, e, "w3")])
            fused.down_proj.data[e] += update(n, e, "w2")
    before = logits(model)
    with attach.worn(attach.fit(model, backend_for(resolve("fp32")), plan)):
        worn = logits(model)
    assert float((worn - before).abs().max()) > 0.01
    torch.testing.assert_close(worn, logits(changed), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("parts", "layout"),
    [(("w1",), "block_sparse_moe"), (("w1", "w3"), "block_sparse_moe"), (("w1", "w2", "w3"), "ffn")],
)
def test_experts_that_cannot_be_fused_are_refused_with_names(mixture, lora, parts, layout):
    checkpoint, model = mixture
    modules = {name.replace("block_sparse_moe", layout): size for name, size in experts(*parts).items()}
    with pytest.raises(UserError, match="experts|w1"):
        plan = lora(modules, on=checkpoint, target_modules=list(parts))
        attach.fit(model, backend_for(resolve("fp32")), plan)


def test_a_layer_that_the_file_lacks_is_named(model, lora):
    with pytest.raises(UserError, match=r"incomplete.*layers\.1\.self_attn\.q_proj"):
        attach.fit(model, backend_for(resolve("fp32")), lora({Q.format(0): BOTH[Q.format(0)]}))
    only = lora({Q.format(0): BOTH[Q.format(0)]}, layers_to_transform=[0])
    assert effect(model, only)[0] > 0, "a layer that was not trained is not missing"


@pytest.mark.parametrize("config", [{"loud": 0.0}, {"lora_alpha": 0}])
def test_no_effect_is_said(model, lora, config):
    moved, notes = effect(model, lora(BOTH, **config))
    assert moved == 0 and "no effect" in " ".join(notes)


def test_unknown_settings_are_named_and_ignored(model, lora):
    plan = lora(BOTH, use_hyperspline=True, spline_knots=[1, 2], peft_version="9.9.9")
    moved, notes = effect(model, plan)
    assert moved == effect(model, lora(BOTH))[0]
    assert "spline_knots, use_hyperspline" in " ".join(notes) and "peft_version" not in " ".join(notes)


def test_a_merge_leaves_the_tied_twin_alone(checkpoint, model, lora):
    assert checkpoint.tied, "this tests nothing"
    head = {"lm_head": (4, WIDTH, checkpoint.vocab_size)}
    own, backend = copy.deepcopy(model), backend_for(resolve("fp32"))
    embedding = own.get_input_embeddings().weight.clone()
    with attach.worn(attach.fit(model, backend, lora(head, target_modules=["lm_head"]))):
        unmerged = logits(model)
    merged, notes = attach.merge(own, backend, lora(head, target_modules=["lm_head"], merged=True))
    assert (merged.get_input_embeddings().weight == embedding).all(), "the merge changed the embedding"
    assert float((logits(merged) - unmerged).abs().max()) < 1e-3
    assert "lm_head" in notes[0] and "own" in notes[0]


@pytest.mark.parametrize(
    "name",
    [
        "unsloth/SmolLM2-135M-Instruct-bnb-4bit",
        "unsloth/SmolLM2-135M-Instruct-unsloth-bnb-4bit",
        "someone/smollm2-135m-instruct-GPTQ-Int4",
        "someone/SmolLM2-135M-Instruct-AWQ",
        "someone/SmolLM2-135M-Instruct.Q4_K_M",
    ],
)
def test_a_quantized_copy_of_the_base_is_the_same_base(builtin, name):
    from comparator.adapters.compatibility import _same_model

    assert _same_model(name, builtin)
    assert not _same_model(name.replace("135M", "360M").replace("135m", "360m"), builtin)
