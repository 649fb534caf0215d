"""bitsandbytes on shapes and architectures that it finds hard, with real kernels."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import sample
import tiny_models

from comparator.backends import backend_for, require_full_precision, resolve, unquantized_experts
from comparator.backends.base import Placement
from comparator.comparison.runner import compare
from comparator.core.errors import UserError
from comparator.core.messages import LoadRequest
from comparator.core.request import GenerationSettings, Request
from comparator.core.result import Fidelity
from comparator.core.settings import Settings
from comparator.core.variant import Cell, Variant
from comparator.engine.local import LocalEngine
from comparator.fidelity import verdict
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint


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
    engine = LocalEngine(Settings())
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
    engine = LocalEngine(Settings())
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
    engine = LocalEngine(Settings())
    engine.open("smollm2-135m", threading.Event())
    try:
        wanted = resolve("fp4:dq,compute=fp32,dtype=fp16")
        loaded = engine.load(LoadRequest("smollm2-135m", wanted), threading.Event())

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
    engine = LocalEngine(Settings())
    engine.open("smollm2-135m", threading.Event())
    wanted = resolve("nf4:skip=q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj+lm_head")
    with pytest.raises(UserError, match="no linear layer"):
        engine.load(LoadRequest("smollm2-135m", wanted), threading.Event())
    assert not engine.state().residents


def test_skip_adds_to_the_head_and_only_replaces_it(saved):
    model = saved(small("Llama", tie_word_embeddings=False))

    def stored(cell) -> dict[str, str]:
        parts = ("lm_head", "0.self_attn.q_proj", "0.self_attn.k_proj")
        return {
            p: next(r.logical_dtype for r in cell.layers if r.name.endswith(f"{p}.weight")) for p in parts
        }

    plain, added, only, nothing = run(
        model, "nf4", "nf4:skip=q_proj", "nf4:skip=only+q_proj", "nf4:skip=only+no_such"
    )
    assert list(stored(plain).values()) == ["bf16", "nf4", "nf4"]
    assert list(stored(added).values()) == ["bf16", "bf16", "nf4"], "naming a module unprotected the head"
    assert list(stored(only).values()) == ["nf4", "bf16", "nf4"]
    assert list(stored(nothing).values()) == ["nf4", "nf4", "nf4"]
    assert not any("skip" in note for note in added.notes)
    assert any("lm_head is quantized too" in note for note in only.notes), "what it unprotects is not said"
    assert any("no_such" in note for note in nothing.notes)
    backend = backend_for(resolve("nf4"))
    for cell in (plain, added, only):
        needed = backend.needed_bytes(resolve(cell.variant), open_checkpoint(model))
        assert needed == pytest.approx(cell.memory.weight_bytes + cell.memory.quant_state_bytes, rel=0.05)
    _, (setup,), _ = backend.code(resolve("nf4:skip=q_proj"), Placement(), layers=added.layers)
    assert "llm_int8_skip_modules=['lm_head', 'q_proj']" in setup
    _, (setup,), _ = backend.code(resolve("nf4:skip=only+q_proj"), Placement(), layers=only.layers)
    assert "llm_int8_skip_modules=['q_proj']" in setup


def test_experts_that_stay_in_16_bits_are_stated_before_and_after_loading(tmp_path):
    tiny_models.save(tmp_path, "mixtral", dtype="bfloat16")
    reference, column, eight = run(str(tmp_path), "bf16", "nf4", "int8")
    for cell in (column, eight):
        (note,) = [n for n in cell.notes if "experts" in n]
        assert "no linear layers" in note and "%" in note and "Only" in note
        assert "of its weights are quantized)" in verdict.words(scored(cell), reference), (
            "a verdict without the reason"
        )
    checkpoint, variant = open_checkpoint(str(tmp_path)), resolve("nf4")
    needed = backend_for(variant).needed_bytes(variant, checkpoint)
    held = column.memory.weight_bytes + column.memory.quant_state_bytes
    assert needed == pytest.approx(held, rel=0.05), "experts are counted at 4 bits"
    said = unquantized_experts(variant, checkpoint)
    assert "experts" in said and "nf4 leaves in 16 bits" in said
    assert unquantized_experts(resolve("bf16"), checkpoint) == ""
    engine = LocalEngine(Settings(memory_budget="1MB"))
    engine.open(str(tmp_path), threading.Event())
    with pytest.raises(UserError, match="experts"):
        engine.load(LoadRequest(str(tmp_path), variant), threading.Event())


def scored(cell):
    """The column with a reference's answer that it agrees with everywhere."""
    prompt = replace(sample.PROMPT_FIDELITY, kl=(0.01,) * 3, rank=(0,) * 3, top=())
    return replace(cell, fidelity=Fidelity(prompt=prompt))


def test_a_skip_list_holds_names(saved):
    for wrong in ("(([a-z])*)*!", "q_proj|k_proj", ".*", "model..layers"):
        with pytest.raises(UserError, match="skip"):
            resolve(Variant("nf4", options=(("skip", wrong),)))
    assert resolve("int8:skip=q_proj+only").notation == "int8:skip=only+q_proj"


def test_a_quantized_model_names_the_method_that_reads_it(two_layers):
    checkpoint = replace(open_checkpoint(str(two_layers)), quantization={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="gptq@"):
        require_full_precision(checkpoint)
    with pytest.raises(UserError, match=r"quantized already \(awq\).*full-precision"):
        require_full_precision(replace(checkpoint, quantization={"quant_method": "awq"}))
    require_full_precision(replace(checkpoint, quantization=None))


def test_a_pass_that_would_end_the_process_is_refused():
    """bitsandbytes 0.50 calls `exit` where tokens × features of an int8 layer are 2**31: seen at 64 × 8,192 tokens of 4,096."""
    from comparator.backends.bnb import limits
    from comparator.core.errors import UserError

    limits.check_rows(524_287, 4096)
    with pytest.raises(UserError, match="at most 524,287 tokens in one pass of this model, not 524,288"):
        limits.check_rows(524_288, 4096)
