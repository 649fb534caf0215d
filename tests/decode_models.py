"""Tiny random models of many architectures, and steps captured for them, as the decoding tests use them."""

from __future__ import annotations

import threading

from comparator.core.request import GenerationSettings
from comparator.decoding.generate import Run, stream

PROMPT = [1, 45, 87, 12, 200, 33, 90, 17, 150, 61, 7, 99]
SMALL = dict(
    vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
GPT = dict(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2)
ARCHITECTURES = {
    "Llama": SMALL,
    "Mistral": {**SMALL, "sliding_window": 8},
    "Qwen2": SMALL,
    "Qwen3": {**SMALL, "head_dim": 16},
    "Gemma": {**SMALL, "head_dim": 16},
    "Gemma2": {**SMALL, "head_dim": 16, "sliding_window": 8},
    "Phi": SMALL,
    "Phi3": SMALL,
    "OPT": dict(vocab_size=320, hidden_size=64, ffn_dim=128, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=256, word_embed_proj_dim=64),
    "Bloom": dict(vocab_size=320, hidden_size=64, n_layer=2, n_head=4),
    "GPT2": GPT,
    "GPTJ": {**GPT, "rotary_dim": 8},
    "GPTNeoX": SMALL,
    "Falcon": SMALL,
    "Mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mamba": dict(vocab_size=320, hidden_size=64, num_hidden_layers=2),
}  # fmt: skip


def tiny(name: str):
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(**ARCHITECTURES[name])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


GREEDY = GenerationSettings(max_new_tokens=24)
FULL = ["Llama", "Qwen2", "Qwen3", "Gemma", "Phi", "Phi3", "GPTNeoX", "Mixtral", "GPT2"]


def tokens(model, settings, recorded=None, cancel=None):
    run = Run()
    return [t for t, _ in stream(model, PROMPT, settings, cancel or threading.Event(), run, recorded)], run


def recorded_for(model, settings=GREEDY, compiled=False):
    from comparator.decoding.planner import is_plain, record
    from comparator.decoding.static_state import StaticDecodeState, bucket

    fixed = StaticDecodeState(model, bucket(len(PROMPT) + settings.max_new_tokens))
    return record(model, fixed, PROMPT, compiled, is_plain(model, settings))


def filled(model, tokens=24):
    """A fixed step after the prompt, as recording finds it, with what decoding needs around it."""
    import torch

    from comparator.decoding.generate import Stepper
    from comparator.decoding.static_state import StaticDecodeState, bucket

    fixed = StaticDecodeState(model, bucket(len(PROMPT) + tokens))
    with torch.inference_mode():
        stepper = Stepper(model, PROMPT, 2)
        first = stepper.next_logits()
        fixed.fill(stepper.cache, stepper.length, int(first.argmax(-1)), first.shape[-1])
    return fixed
