"""The engine with real weights and real bitsandbytes: tokens, bytes, residency, Stop."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from comparator.backends import resolve
from comparator.core.errors import Stopped, UserError
from comparator.core.events import Chunk
from comparator.core.messages import Loaded, LoadRequest
from comparator.core.request import BUILTIN_MODEL, GenerationSettings
from comparator.core.settings import Settings
from comparator.engine.local import LocalEngine

PROMPTS = ("What is the capital of France?", "Write one line of Python that adds two numbers.")


@pytest.fixture(scope="module")
def model(two_layers) -> str:
    return str(two_layers)


@pytest.fixture(scope="module")
def engine(builtin, model):
    engine = LocalEngine(Settings())
    for name in (BUILTIN_MODEL, model):
        engine.open(name, threading.Event())
    yield engine
    engine.unload()


def load(engine: LocalEngine, model: str, notation: str, **options) -> Loaded:
    return engine.load(LoadRequest(model, resolve(notation), **options), threading.Event())


def generate(engine: LocalEngine, model: str, handle: str, prompt: str = PROMPTS[0], **settings):
    encoded = engine.encode(model, prompt, None, None)
    chunks: list[Chunk] = []
    result = engine.generate(
        handle, encoded, GenerationSettings(**settings), threading.Event(), chunks.append
    )
    return chunks, result


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
def test_greedy_tokens_equal_generate(engine, model, notation):
    _equal_to_generate(engine, model, notation)


def test_greedy_tokens_equal_generate_through_thirty_layers(engine):
    _equal_to_generate(engine, BUILTIN_MODEL, "nf4")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this system records no peak")
@pytest.mark.parametrize("notation", ["bf16", "nf4"])
def test_a_load_needs_little_more_than_what_stays(engine, notation):
    loaded = load(engine, BUILTIN_MODEL, notation)
    engine.unload(loaded.handle)
    largest = 49_152 * 576 * 2  # the embedding in bf16
    assert loaded.memory.load_peak_bytes < loaded.memory.resident_bytes + 2 * largest, (
        "Either the checkpoint is mapped while it is read (compat.transformers.read_into_memory), or malloc keeps what "
        "quantizing has freed (metrics.memory.unfragmented)."
    )


def _equal_to_generate(engine, model: str, notation: str) -> None:
    handle = load(engine, model, notation).handle
    for prompt in PROMPTS:
        _, ours = generate(engine, model, handle, prompt, max_new_tokens=12)
        encoded = engine.encode(model, prompt, None, None)

        def theirs(encoded=encoded):
            import torch

            ids = torch.tensor([encoded.token_ids])
            out = engine._pool.get(handle).model.generate(ids, max_new_tokens=12, do_sample=False)
            return tuple(out[0, ids.shape[1] :].tolist())

        assert ours.token_ids == engine._call(theirs), (
            f"{notation} parts from transformers' generate: look at the inputs of a step (mask, positions, cache)"
        )
    engine.unload(handle)


def test_files_are_examined_without_loading(engine, model, tmp_path):
    assert engine.examined(str(model)).startswith("examined: complete, ")
    residents = engine.state().residents
    shutil.copytree(model, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    assert "of the weights" in engine.examined(str(tmp_path / "other"))
    with pytest.raises(UserError, match="model.layers.2"):
        engine.open(str(tmp_path / "other"), threading.Event())
    assert engine.state().residents == residents


def test_sizes_are_told_without_loading(engine, model):
    """By the estimate that loading is refused by."""
    before = engine.state().residents
    sizes = engine.sizes(str(model))
    assert {"fp32", "bf16", "int8", "nf4"} <= sizes.keys()
    assert sizes["fp32"] == 2 * sizes["bf16"] > sizes["int8"] > sizes["nf4"] > sizes["nf4:dq"]
    assert sizes["bf16"] == engine.needed_bytes(str(model), resolve("bf16"))
    assert engine.state().residents == before
    assert engine.sizes("user/not-on-this-machine") == {}


def test_chunks_add_up_to_the_text(engine):
    handle = load(engine, BUILTIN_MODEL, "bf16").handle
    chunks, result = generate(engine, BUILTIN_MODEL, handle, max_new_tokens=16)
    assert "".join(c.text for c in chunks) == result.text, "the streamed pieces do not add up to the text"
    assert tuple(t for c in chunks for t in c.token_ids) == result.token_ids
    assert "Paris" in result.text
    assert result.finish_reason == "eos"
    assert len(result.latency.itl_s) == len(result.token_ids) - 1


@pytest.mark.parametrize("notation", ["bf16", "int8", "nf4", "nf4:dq", "fp4"])
def test_bytes_equal_an_independent_sum(engine, model, notation):
    loaded = load(engine, model, notation)

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


def test_double_quantization_shows_its_saving_as_loaded(engine, model):
    plain, double = load(engine, model, "nf4").memory, load(engine, model, "nf4:dq").memory
    assert plain.loaded_weight_bytes == double.loaded_weight_bytes
    assert double.loaded_quant_state_bytes < 0.4 * plain.loaded_quant_state_bytes
    assert plain.footprint_bytes == double.footprint_bytes, (
        "get_memory_footprint() now tells dq apart: the page says that it does not"
    )


def test_second_load_is_the_resident_one(engine, model):
    first = load(engine, model, "bf16")
    again = load(engine, model, "bf16")
    assert again.handle == first.handle
    assert again.load_s is None, "a variant that was resident has no load time; 0 would be a lie"


def test_unload_gives_the_memory_back(engine, model):
    handle = load(engine, model, "fp32").handle
    assert engine.unload(handle) > 100e6, "fp32 holds 142 MB and most of it must come back"
    assert engine.handle_of(model, "fp32") is None
    with pytest.raises(UserError, match="no longer loaded"):
        generate(engine, model, handle)


def test_stop_inside_a_prefill_and_between_tokens(engine, model):
    handle = load(engine, model, "bf16").handle
    encoded = engine.encode(model, PROMPTS[0], None, None)
    cancel, reached = threading.Event(), []
    first, second = engine.slot(handle).model.model.layers
    hooks = [
        first.register_forward_hook(lambda *_: cancel.set()),
        second.register_forward_hook(lambda *_: reached.append(2)),
    ]
    result = engine.generate(handle, encoded, GenerationSettings(max_new_tokens=8), cancel)
    for hook in hooks:
        hook.remove()
    assert result.finish_reason == "stopped" and not result.token_ids
    assert not reached, "Stop is not honoured inside a forward pass"

    cancel = threading.Event()
    encoded = engine.encode(model, "Tell me a long story.", None, None)
    chunks = []

    def stop_at_five(chunk: Chunk) -> None:
        chunks.append(chunk)
        if len(chunks) == 5:
            cancel.set()

    result = engine.generate(handle, encoded, GenerationSettings(max_new_tokens=200), cancel, stop_at_five)
    assert result.finish_reason == "stopped" and len(result.token_ids) < 20


def test_stop_while_loading_leaves_nothing(engine, model):
    before = len(engine.state().residents)
    cancel = threading.Event()
    with pytest.raises(Stopped):
        engine.load(LoadRequest(model, resolve("nf4:compute=fp32")), cancel, lambda *_: cancel.set())
    assert len(engine.state().residents) == before


def test_an_error_in_a_callback_stops_the_run_and_frees_the_engine(engine, model):
    handle = load(engine, model, "bf16").handle
    encoded = engine.encode(model, "Tell me a long story.", None, None)
    settings, cancel, steps = GenerationSettings(max_new_tokens=500), threading.Event(), []
    hook = engine.slot(handle).model.register_forward_hook(lambda *_: steps.append(1))
    with pytest.raises(ZeroDivisionError):
        engine.generate(handle, encoded, settings, cancel, lambda chunk: 1 / 0)
    assert cancel.is_set(), "the run was not told to stop"
    generate(engine, model, handle, max_new_tokens=2)
    hook.remove()
    assert len(steps) < 250, "an abandoned run goes on and blocks the next one"


def test_same_seed_same_tokens_and_common_random_numbers(engine, model):
    handle = load(engine, model, "bf16").handle
    settings = dict(max_new_tokens=12, temperature=1.0, seed=7)
    _, first = generate(engine, model, handle, **settings)
    _, again = generate(engine, model, handle, **settings)
    _, other = generate(engine, model, handle, **{**settings, "seed": 8})
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids


def test_budget_refuses_with_both_figures_and_evicts_when_allowed(model):
    engine = LocalEngine(Settings(memory_budget="380MB"))
    engine.open(model, threading.Event())
    load(engine, model, "bf16")
    with pytest.raises(UserError) as refused:
        load(engine, model, "int8", evict=False)
    assert "GB" in refused.value.problem or "MB" in refused.value.problem
    assert "bf16" in refused.value.advice, "the refusal must say what to unload"
    load(engine, model, "int8", evict=True)
    assert [r.variant for r in engine.state().residents] == ["int8"]
    with pytest.raises(UserError, match="COMPARATOR_MEMORY_BUDGET"):
        load(engine, model, "fp32")
    assert [r.variant for r in engine.state().residents] == ["int8"], "what can never fit must evict nothing"
    engine.unload()


def test_a_torch_that_cannot_be_imported_is_named(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from comparator.core.errors import UserError\n"
        "from comparator.core.settings import Settings\n"
        "from comparator.engine.local import LocalEngine\n"
        "engine = LocalEngine(Settings())\n"
        "for _ in range(2):\n"
        "    try: engine.environment()\n"
        "    except UserError as problem: print(problem)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=100)
    assert done.stdout.count("libcudart.so.13") == 2, done.stdout + done.stderr[-2000:]
