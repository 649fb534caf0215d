"""bitsandbytes on shapes and architectures that it finds hard, with real kernels."""

from __future__ import annotations

import threading

import pytest

from comparator.backends import resolve
from comparator.code import snippet
from comparator.compare import compare
from comparator.engine import Engine
from comparator.settings import Settings
from comparator.types import Cell, GenerationSettings, Problem, Request


@pytest.fixture
def saved(tmp_path, builtin):
    """A tiny random model of any architecture in a folder, with the built-in tokenizer."""

    def save(config) -> str:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(builtin.path)
        config.vocab_size = len(tokenizer)
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
        tokenizer.save_pretrained(tmp_path)
        return str(tmp_path)

    return save


def run(model: str, *variants: str):
    request = Request(model, tuple(Cell(resolve(v)) for v in variants), "Hello there",
                      settings=GenerationSettings(max_new_tokens=4), fidelity="none")  # fmt: skip
    engine = Engine(Settings())
    try:
        return list(compare(request, engine=engine))[-1].comparison.cells
    finally:
        engine.unload()


def small(name: str, **changes):
    import transformers

    values = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip
    return getattr(transformers, name + "Config")(**{**values, **changes})


def test_a_layer_whose_shape_the_packed_kernel_refuses(saved):
    """96 is no multiple of 64, 40 none of 32: the AVX-512 kernel asserts, the general path takes them."""
    model = saved(small("Llama", hidden_size=96, intermediate_size=168, num_attention_heads=4, head_dim=24))
    for cell in run(model, "bf16", "nf4", "fp4", "int8"):
        assert cell.status == "ok", f"{cell.variant}: {cell.error}"


def test_the_code_for_such_a_layer_runs_too(saved):
    model = saved(small("Llama", hidden_size=96, intermediate_size=168, num_attention_heads=4, head_dim=24))
    wanted = Request(model, (Cell(resolve("nf4")),), "Hello there", settings=GenerationSettings(max_new_tokens=4),
                     fidelity="none")  # fmt: skip
    engine = Engine(Settings())
    try:
        comparison = list(compare(wanted, engine=engine))[-1].comparison
    finally:
        engine.unload()
    copied: dict = {}
    exec(snippet(comparison.cells[0], comparison), copied)
    assert tuple(copied["new_tokens"]) == comparison.cells[0].token_ids


def test_mixture_of_experts_says_what_stays(saved):
    model = saved(small("Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
                        shared_expert_intermediate_size=64))  # fmt: skip
    (cell,) = run(model, "nf4")
    assert cell.status == "ok", cell.error
    assert any("expert" in note for note in cell.notes), "fused experts stay bf16, and nobody is told"


@pytest.mark.parametrize("name", ["OPT", "GPT2", "Bloom"])
def test_older_architectures(saved, name):
    import transformers

    shapes = {
        "OPT": dict(
            hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=64
        ),
        "GPT2": dict(n_embd=64, n_layer=2, n_head=4),
        "Bloom": dict(hidden_size=64, n_layer=2, n_head=4),
    }[name]
    model = saved(getattr(transformers, name + "Config")(**shapes))
    for cell in run(model, "bf16", "int8", "nf4"):
        assert cell.status == "ok", f"{name} {cell.variant}: {cell.error}"
        assert cell.memory.weight_bytes == sum(r.bytes for r in cell.layers)


def test_what_the_notation_says_is_what_loads(builtin):
    engine = Engine(Settings())
    list(engine.open("smollm2-135m", threading.Event()))
    try:
        loaded = list(
            engine.load("smollm2-135m", resolve("fp4:dq,compute=fp32,dtype=fp16"), threading.Event())
        )[-1]

        def facts():
            import torch

            model = engine._pool.get(loaded.handle).model
            linear = model.model.layers[0].self_attn.q_proj
            assert linear.weight.quant_state.quant_type == "fp4"
            assert linear.compute_dtype == torch.float32
            assert model.model.norm.weight.dtype == torch.float16
            assert linear.weight.compress_statistics

        engine._call(facts)
    finally:
        engine.unload()


def test_nothing_to_quantize_is_refused(builtin):
    engine = Engine(Settings())
    list(engine.open("smollm2-135m", threading.Event()))
    with pytest.raises(Problem, match="no linear layer"):
        list(
            engine.load(
                "smollm2-135m",
                resolve("nf4:skip=q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj+lm_head"),
                threading.Event(),
            )
        )
    assert not engine.state().residents
