"""The engine with the real built-in model and real bitsandbytes: tokens, bytes, residency, turns, Stop."""

from __future__ import annotations

import threading
import time

import pytest

from comparator.backends import resolve
from comparator.engine import Engine, Loaded, Turns
from comparator.settings import Settings
from comparator.types import BUILTIN_MODEL, Chunk, GenerationSettings, Problem, Stopped

PROMPTS = ("What is the capital of France?", "Write one line of Python that adds two numbers.")


@pytest.fixture(scope="module")
def engine(builtin):
    engine = Engine(Settings())
    list(engine.open(BUILTIN_MODEL, threading.Event()))
    yield engine
    engine.unload()


def load(engine: Engine, notation: str, **options) -> Loaded:
    return list(engine.load(BUILTIN_MODEL, resolve(notation), threading.Event(), **options))[-1]


def generate(engine: Engine, handle: str, prompt: str = PROMPTS[0], **settings):
    encoded = engine.encode(BUILTIN_MODEL, prompt, None, None)
    items = list(engine.generate(handle, encoded, GenerationSettings(**settings), threading.Event()))
    return items[:-1], items[-1]


@pytest.mark.parametrize(
    "notation",
    [
        "fp32",
        "bf16",
        "int8",
        "int8:threshold=0",
        "nf4",
        "nf4:dq,compute=fp16",
        "fp4:dtype=fp32",
        "nf4:storage=bf16",
    ],
)
def test_greedy_tokens_equal_generate(engine, notation):
    handle = load(engine, notation).handle
    for prompt in PROMPTS:
        _, ours = generate(engine, handle, prompt, max_new_tokens=12)
        encoded = engine.encode(BUILTIN_MODEL, prompt, None, None)

        def theirs(encoded=encoded):
            import torch

            ids = torch.tensor([encoded.token_ids])
            out = engine._pool.get(handle).model.generate(ids, max_new_tokens=12, do_sample=False)
            return tuple(out[0, ids.shape[1] :].tolist())

        assert ours.token_ids == engine._call(theirs), (
            f"{notation} parts from transformers' generate: look at the inputs of a step (mask, positions, cache)"
        )
    engine.unload(handle)


def test_chunks_add_up_to_the_text(engine):
    chunks, result = generate(engine, load(engine, "bf16").handle, max_new_tokens=16)
    assert all(isinstance(c, Chunk) for c in chunks)
    assert "".join(c.text for c in chunks) == result.text, "the streamed pieces do not add up to the text"
    assert tuple(t for c in chunks for t in c.token_ids) == result.token_ids
    assert "Paris" in result.text
    assert result.finish_reason == "eos"
    assert len(result.latency.itl_s) == len(result.token_ids) - 1


@pytest.mark.parametrize("notation", ["bf16", "int8", "nf4", "nf4:dq", "fp4"])
def test_bytes_equal_an_independent_sum(engine, notation):
    loaded = load(engine, notation)

    def independent():
        model = engine._pool.get(loaded.handle).model
        weights, states = {}, {}
        for _name, module in model.named_modules():
            keep = [
                b
                for n, b in module._buffers.items()
                if b is not None and n not in module._non_persistent_buffers_set
            ]
            for tensor in [*(p for p in module._parameters.values() if p is not None), *keep]:
                weights[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
            weight = getattr(module, "weight", None)
            state = getattr(weight, "quant_state", None)
            found = []
            if state is not None:
                found = [state.absmax, state.code, getattr(state, "offset", None)]
                nested = getattr(state, "state2", None)
                found += [nested.absmax, nested.code] if nested is not None else []
            elif type(module).__name__ == "Linear8bitLt":
                found = [weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB]
            for tensor in (t for t in found if t is not None):
                states[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return sum(weights.values()), sum(states.values())

    weights, states = engine._call(independent)
    assert loaded.memory.weight_bytes == weights
    assert loaded.memory.quant_state_bytes == states, "a part of the quant state is missed or counted twice"
    rows = engine.layers(loaded.handle)
    assert sum(r.bytes for r in rows) == weights
    assert sum(r.quant_state_bytes for r in rows) == states


def test_double_quantization_shows_its_saving_as_loaded(engine):
    plain, double = load(engine, "nf4").memory, load(engine, "nf4:dq").memory
    assert plain.loaded_weight_bytes == double.loaded_weight_bytes
    assert double.loaded_quant_state_bytes < 0.4 * plain.loaded_quant_state_bytes
    assert plain.footprint_bytes == double.footprint_bytes, (
        "get_memory_footprint() now tells dq apart: the page says that it does not"
    )


def test_second_load_is_the_resident_one(engine):
    first = load(engine, "bf16")
    again = load(engine, "bf16")
    assert again.handle == first.handle
    assert again.load_s is None, "a variant that was resident has no load time; 0 would be a lie"


def test_unload_gives_the_memory_back(engine):
    handle = load(engine, "fp32").handle
    assert engine.unload(handle) > 400e6, "fp32 holds 538 MB and most of it must come back"
    assert engine.handle_of(BUILTIN_MODEL, "fp32") is None
    with pytest.raises(Problem, match="no longer loaded"):
        generate(engine, handle)


def test_stop_inside_a_prefill_and_between_tokens(engine):
    handle = load(engine, "bf16").handle
    encoded = engine.encode(BUILTIN_MODEL, "word " * 1500, None, None)
    cancel = threading.Event()
    stream = engine.generate(handle, encoded, GenerationSettings(max_new_tokens=8), cancel)
    threading.Timer(0.5, cancel.set).start()
    start = time.monotonic()
    result = list(stream)[-1]
    assert result.finish_reason == "stopped"
    assert time.monotonic() - start < 2.5, "Stop is not honoured inside a forward pass"

    cancel = threading.Event()
    encoded = engine.encode(BUILTIN_MODEL, "Tell me a long story.", None, None)
    got = []
    for item in engine.generate(handle, encoded, GenerationSettings(max_new_tokens=200), cancel):
        got.append(item)
        if len(got) == 5:
            cancel.set()
    assert got[-1].finish_reason == "stopped" and len(got[-1].token_ids) < 20


def test_stop_while_loading_leaves_nothing(engine):
    before = len(engine.state().residents)
    cancel = threading.Event()
    with pytest.raises(Stopped):
        for _ in engine.load(BUILTIN_MODEL, resolve("nf4:compute=fp32"), cancel):
            cancel.set()
    assert len(engine.state().residents) == before


def test_closing_the_iterator_frees_the_engine(engine):
    handle = load(engine, "bf16").handle
    encoded = engine.encode(BUILTIN_MODEL, "Tell me a long story.", None, None)
    stream = engine.generate(handle, encoded, GenerationSettings(max_new_tokens=500), threading.Event())
    next(stream)
    start = time.monotonic()
    stream.close()
    generate(engine, handle, max_new_tokens=2)
    assert time.monotonic() - start < 5, "an abandoned run goes on and blocks the next one"


def test_same_seed_same_tokens_and_common_random_numbers(engine):
    handle = load(engine, "bf16").handle
    settings = dict(max_new_tokens=12, temperature=1.0, seed=7)
    _, first = generate(engine, handle, **settings)
    _, again = generate(engine, handle, **settings)
    _, other = generate(engine, handle, **{**settings, "seed": 8})
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids


def test_budget_refuses_with_both_figures_and_evicts_when_allowed(builtin):
    engine = Engine(Settings(memory_budget="700MB"))
    list(engine.open(BUILTIN_MODEL, threading.Event()))
    load(engine, "bf16")
    with pytest.raises(Problem) as refused:
        load(engine, "int8", evict=False)
    assert "GB" in refused.value.problem or "MB" in refused.value.problem
    assert "bf16" in refused.value.advice, "the refusal must say what to unload"
    load(engine, "int8", evict=True)
    assert [r.variant for r in engine.state().residents] == ["int8"]
    with pytest.raises(Problem, match="COMPARATOR_MEMORY_BUDGET"):
        load(engine, "fp32")
    assert [r.variant for r in engine.state().residents] == ["int8"], "what can never fit must evict nothing"
    engine.unload()


def test_turns_are_first_come_first_served():
    turns, cancel = Turns(), threading.Event()
    first, second, third = turns.enter(), turns.enter(), turns.enter()
    assert turns.waiting == 2
    assert list(turns.wait(first, cancel)) == []
    waiting = turns.wait(third, cancel)
    assert next(waiting) == 2
    turns.leave(first)
    assert next(waiting) == 1
    assert list(turns.wait(second, cancel)) == []
    turns.leave(second)
    assert list(waiting) == []
