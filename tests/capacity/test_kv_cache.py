"""The KV cache's bytes without a model against a cache that transformers really allocated, of tiny random models."""

from __future__ import annotations

import json

import pytest
import transformers

from comparator.capacity import kv_cache
from comparator.metrics.memory import cache_bytes
from comparator.sources import Checkpoint

BASE = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "pad_token_id": None, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS = {
    "grouped queries": ("LlamaConfig", {}),
    "sliding window": ("MistralConfig", {"sliding_window": 9}),
    "every other layer slides": ("Gemma2Config", {"sliding_window": 9}),
    "mixture of experts": ("Qwen3MoeConfig", EXPERTS),
    "MLA": (
        "DeepseekV3Config",
        {"kv_lora_rank": 24, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "head_dim": 8,
         "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
         "moe_intermediate_size": 32, "first_k_dense_replace": 1},
    ),
    "linear attention beside full": (
        "Qwen3NextConfig", {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    ),
    "state space": ("MambaConfig", {"state_size": 4}),
    "state space beside attention": ("FalconH1Config", {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}),
    "convolutions beside attention": ("Lfm2Config", {"layer_types": ["conv", "full_attention"] * 2}),
    "learned positions": ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}),
}  # fmt: skip


def allocated(config, tokens: int) -> int:
    """Bytes of the cache that a pass over `tokens` tokens fills, of a model with real memory."""
    import torch

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    cache = transformers.DynamicCache(config=config.get_text_config(decoder=True))
    with torch.inference_mode():
        model(input_ids=torch.ones((1, tokens), dtype=torch.long), past_key_values=cache, use_cache=True)
    return cache_bytes(cache)


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_counted_is_what_is_allocated(kind, tmp_path):
    name, changes = MODELS[kind]
    known = BASE if "n_embd" not in changes else {"vocab_size": 96}
    config = getattr(transformers, name)(**{**known, **changes})
    config.save_pretrained(tmp_path)
    found = kv_cache.geometry(Checkpoint("tiny", tmp_path, name, 0, "bf16"), "bf16")
    assert found.exact, f"transformers no longer runs {name} on the meta device with a DynamicCache"
    for tokens in (5, 40):
        slack = 8 * len(found.layers)  # a sliding layer keeps its window as a tensor of 8 bytes, too
        assert 0 <= allocated(config, tokens) - found.bytes(tokens) <= slack, (
            f"{kind}, {tokens} tokens: {found.words()}"
        )


def test_a_model_that_cannot_be_asked_is_counted_from_its_config(tmp_path):
    values = {
        "model_type": "no_such",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_size": 64,
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    found = kv_cache.geometry(Checkpoint("tiny", tmp_path, "", 0, "bf16"), "fp32")
    assert not found.exact and found.bytes(10) == 10 * 3 * 2 * 2 * 16 * 4
