"""The private parts of transformers are where comparator/util/compat/transformers.py expects them."""

from __future__ import annotations

import pytest

from comparator.util.compat import transformers as compat


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, eos_token_id=3)
    )  # fmt: skip


def test_what_a_model_takes(model):
    from transformers import MambaConfig, MambaForCausalLM, RwkvConfig, RwkvForCausalLM

    assert compat.takes_dynamic_cache(model) is True and compat.takes_logits_to_keep(model) is True
    small = dict(vocab_size=32, hidden_size=16, num_hidden_layers=2)
    rwkv = RwkvForCausalLM(RwkvConfig(**small, attention_hidden_size=16, intermediate_size=16))
    assert not compat.takes_dynamic_cache(rwkv)
    assert compat.takes_dynamic_cache(MambaForCausalLM(MambaConfig(**small)))


def test_the_attention_in_use(model):
    assert compat.attention(model) == "sdpa"
    model.set_attn_implementation("eager")
    assert compat.attention(model) == "eager"
    model.set_attn_implementation("sdpa")


def test_the_processors_of_generate(model):
    from transformers import GenerationConfig

    config = GenerationConfig(
        do_sample=True, temperature=0.5, top_k=4, repetition_penalty=1.5, min_new_tokens=2, eos_token_id=3
    )
    names = {type(p).__name__ for p in compat.logits_processors(model, config, prompt_length=5, device="cpu")}
    assert names >= {"RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper"}
    assert "MinNewTokensLengthLogitsProcessor" in names, "special tokens are prepared in another way"


def test_the_kernels_of_decoding(model):
    assert hasattr(model, "_optimize_model_for_decode"), (
        "`generate` switches mixture-of-experts kernels in another way: change decode_kernels"
    )
    with compat.decode_kernels(model):
        pass


def test_an_attention_function_is_replaced_for_one_table():
    from transformers.modeling_utils import AttentionInterface

    table, other = AttentionInterface(), AttentionInterface()
    own, first, second = table["sdpa"], object(), object()
    with compat.attention_function(table, "sdpa", first):
        with compat.attention_function(table, "sdpa", second):
            assert table["sdpa"] is second and other["sdpa"] is own
        assert table["sdpa"] is first, "an override that was there before is lost"
    assert table["sdpa"] is own and "sdpa" not in table._local_mapping


def test_one_gpu(tmp_path):
    from transformers import TrainingArguments

    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    before = arguments.n_gpu
    arguments._n_gpu = 4
    assert arguments.n_gpu == 4, "a trainer counts its GPUs in another way: change use_one_gpu"
    compat.use_one_gpu(arguments)
    assert (before, arguments.n_gpu) == (before, 1)


def test_ways_to_split_text():
    assert {"llama-bpe", "qwen2"} <= compat.gguf_text_splits()


def test_the_class_of_a_config(model):
    assert compat.causal_class(model.config) is type(model)


def test_experts_are_multiplied_in_one_batch():
    """A pass on the meta device has no routing to read shapes from."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                           num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)  # fmt: skip
    compat.use_batched_experts(config)
    with torch.device("meta"):
        logits = MixtralForCausalLM(config)(torch.zeros(1, 3, dtype=torch.long)).logits
    assert logits.shape == (1, 3, 32)


def test_what_a_quantizer_leaves_alone(model):
    from transformers import T5Config, T5ForConditionalGeneration

    assert compat.kept_in_fp32(model) == []
    t5 = T5ForConditionalGeneration(
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    )
    assert compat.kept_in_fp32(t5) == ["wo"]


def test_files_are_read_and_not_mapped(model, tmp_path):
    from transformers import LlamaForCausalLM, modeling_utils

    model.save_pretrained(tmp_path)
    asked, original = [], modeling_utils.safe_open

    def noted(*args, **options):
        asked.append(options.get("backend"))
        return original(*args, **options)

    modeling_utils.safe_open = noted
    try:
        with compat.read_into_memory() as able:
            LlamaForCausalLM.from_pretrained(tmp_path)
        assert able and asked == ["pread"], (
            "from_pretrained opens safetensors in another way: change read_into_memory"
        )
        assert modeling_utils.safe_open is noted
    finally:
        modeling_utils.safe_open = original
