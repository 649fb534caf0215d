"""The decode loop on tiny random models of many architectures: greedy tokens equal `generate`."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from decode_models import ARCHITECTURES, PROMPT, tiny

from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings
from comparator.decoding.generate import Run, stream
from comparator.decoding.sampling import gumbel


def ours(model, settings: GenerationSettings, cancel: threading.Event | None = None) -> tuple[list[int], Run]:
    run = Run()
    return [t for t, _ in stream(model, PROMPT, settings, cancel or threading.Event(), run)], run


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_equals_generate(name, penalty):
    import torch

    model = tiny(name)
    got, run = ours(model, GenerationSettings(max_new_tokens=16, repetition_penalty=penalty))
    expected = model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.long),
        max_new_tokens=16,
        do_sample=False,
        repetition_penalty=penalty,
    )[0, len(PROMPT) :].tolist()
    assert got == expected, (
        f"{name}: a step's inputs differ from what generate feeds (positions, mask, cache)"
    )
    assert run.kv_cache_bytes and run.kv_cache_bytes > 0
    assert run.finish_reason == ("eos" if got[-1] in (2, 50256) and len(got) < 16 else run.finish_reason)


def test_suppressed_tokens_of_the_generation_config_hold():
    model = tiny("Llama")
    first = ours(model, GenerationSettings(max_new_tokens=1))[0][0]
    model.generation_config.suppress_tokens = [first]
    assert ours(model, GenerationSettings(max_new_tokens=1))[0][0] != first


def test_the_models_own_sampling_defaults_do_not_leak_in():
    model = tiny("Llama")
    plain = ours(model, GenerationSettings(max_new_tokens=8, temperature=1.0, seed=3))[0]
    model.generation_config.update(top_k=1, temperature=0.1, top_p=0.1, do_sample=True, min_p=0.5)
    assert ours(model, GenerationSettings(max_new_tokens=8, temperature=1.0, seed=3))[0] == plain


def test_nan_logits_are_named_not_decoded():
    import torch

    model = tiny("Llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN"):
        ours(model, GenerationSettings(max_new_tokens=4))


def test_hooks_are_gone_after_a_run():
    model = tiny("Llama")
    ours(model, GenerationSettings(max_new_tokens=2))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_gumbel_noise_depends_on_seed_step_and_token_alone():
    small, large = gumbel(5, 3, 100), gumbel(5, 3, 1000)
    assert np.array_equal(small, large[:100]), "vocabularies of different size must share their noise"
    assert not np.array_equal(gumbel(5, 4, 100), small)
    assert not np.array_equal(gumbel(6, 3, 100), small)


def test_sampling_draws_from_the_distribution():
    """Gumbel-max over many steps against the probabilities, on a fixed distribution."""
    p = np.array([0.5, 0.3, 0.15, 0.05])
    draws = [int(np.argmax(np.log(p) + gumbel(0, step, 4))) for step in range(4000)]
    share = np.bincount(draws, minlength=4) / len(draws)
    assert np.abs(share - p).max() < 0.03, f"drew {share}, expected {p}"
