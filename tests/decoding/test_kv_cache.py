"""A quantized KV cache as an option of a column: tokens of transformers' own, bytes, loss that shows, and what is refused."""

from __future__ import annotations

import threading

import pytest

from comparator.backends import backend_for, resolve
from comparator.core.errors import UserError
from comparator.core.messages import LoadRequest, Prompt
from comparator.core.request import GenerationSettings

PROMPT = tuple(100 + 7 * n for n in range(150))
NEW = 12
NEVER = threading.Event()


@pytest.fixture(scope="module")
def column(engine, two_layers):
    """`column("bf16:kv=int8")` is that variant of the two-layer model, resident."""

    def load(notation: str):
        handle = engine.load(LoadRequest(str(two_layers), resolve(notation)), NEVER).handle
        return engine.column(handle)

    return load


def generated(slot):
    return slot.generate(
        Prompt(PROMPT, False), GenerationSettings(max_new_tokens=NEW), NEVER, lambda token: None
    )


def test_the_option_belongs_to_every_method_of_transformers():
    assert resolve("nf4:kv=int8,dq").notation == "nf4:dq,kv=int8"
    for wrong in ("bf16:kv=int3", "endpoint@http://127.0.0.1:1/v1:kv=int8", "gguf:kv=int8"):
        with pytest.raises(UserError):
            resolve(wrong)
    assert "kv int4" in backend_for(resolve("int8:kv=int4")).describe(resolve("int8:kv=int4"))


@pytest.mark.parametrize(("kind", "bits"), [("int8", 8), ("int4", 4)])
def test_tokens_and_bytes_are_those_of_transformers_own_cache(column, kind, bits):
    import torch

    with column(f"bf16:kv={kind}") as slot:
        run = generated(slot)
        assert run.decode_path == "eager" and any(f"KV cache in {bits} bits" in note for note in slot.notes)
        cache = {"backend": "hqq", "nbits": bits, "axis_key": 1, "axis_value": 1, "q_group_size": 64}
        with torch.inference_mode():
            output = slot.model.generate(
                torch.tensor([PROMPT]), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, num_beams=1,
                cache_implementation="quantized", cache_config=cache,
            )  # fmt: skip
    assert list(run.token_ids) == output[0, len(PROMPT) :].tolist()[: len(run.token_ids)]
    layers, heads, size, tensors = 2, 3, 64, 2
    of_token = layers * heads * tensors * size
    quantized = (
        len(PROMPT) * of_token * bits // 8 + len(PROMPT) * of_token // 64 * 4
    )  # a scale and a zero per group, bf16
    assert run.kv_cache_bytes == quantized + (len(run.token_ids) - 1) * of_token * 2


def test_the_loss_shows_on_a_text_and_grows_with_fewer_bits(column):
    import torch

    with column("bf16") as slot:
        whole = slot.window_logits(PROMPT, 0, NEVER).float()
        forced = torch.stack(list(slot.answer_logits(PROMPT, range(200, 206), NEVER)))
    losses = {}
    for kind in ("int8", "int4"):
        with column(f"bf16:kv={kind}") as slot:
            text = divergence(whole, slot.window_logits(PROMPT, 0, NEVER).float())
            answer = divergence(forced, torch.stack(list(slot.answer_logits(PROMPT, range(200, 206), NEVER))))
            assert (
                slot.answer_many([PROMPT], GenerationSettings(max_new_tokens=2), NEVER, lambda *_: None)
                is None
            )
            assert slot.timed_batch([PROMPT, PROMPT], 4, NEVER).decode()[2], (
                "a batch is not decoded through it"
            )
        assert float(text[0]) < 1e-3, "the first token reads nothing from the cache"
        losses[kind] = (float(text[64:].mean()), float(answer[1:].mean()))
    for eight, four in zip(losses["int8"], losses["int4"], strict=True):
        assert 0 < eight < four < 0.1, losses


def divergence(reference, other):
    p, q = reference.log_softmax(-1), other.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_an_odd_number_of_groups_is_packed_too(column, kind):
    """Three heads and an odd prompt: HQQ alone loses the last row of 4 bits, and fails."""
    with column(f"bf16:kv={kind}") as slot:
        run = slot.generate(
            Prompt(PROMPT[:33], False), GenerationSettings(max_new_tokens=3), NEVER, lambda t: None
        )
        assert len(run.token_ids) == 3


def test_a_model_with_sliding_layers_is_refused_by_name():
    from types import SimpleNamespace

    from transformers import MistralConfig, MistralForCausalLM

    from comparator.decoding import kv_cache

    config = MistralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config)
    with pytest.raises(UserError, match="kv=int8 is not possible"):
        kv_cache.quantize(model, "int8")
    assert not kv_cache.is_quantized(model) and not kv_cache.is_quantized(SimpleNamespace())


def test_without_hqq_it_is_listed_with_the_reason(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "hqq" else real(name, *rest)
    )
    variant = resolve("bf16:kv=int8")
    assert "requirements-formats.txt" in backend_for(variant).unavailable(variant)
    assert backend_for(variant).unavailable(resolve("bf16")) is None
