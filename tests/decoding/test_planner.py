"""Graph decode: everything but the capture itself on a CPU, where "replaying" calls the step; the rest marked gpu."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
from decode_models import FULL, GREEDY, PROMPT, recorded_for, tiny, tokens

from comparator.core.errors import UserError
from comparator.decoding.generate import Run, stream


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        replace(GREEDY, repetition_penalty=1.4),
        replace(GREEDY, temperature=0.8, top_p=0.9, top_k=40, seed=7),
        replace(GREEDY, temperature=1.2, repetition_penalty=1.2, seed=3),
        replace(GREEDY, max_new_tokens=1),
        replace(GREEDY, max_new_tokens=2),
    ],
    ids=["greedy", "penalty", "sampled", "both", "one", "two"],
)
def test_fixed_addresses_give_the_eager_tokens(name, settings):
    from comparator.decoding.static_state import refusal

    model = tiny(name)
    assert refusal(model, 256) is None
    recorded, _, check = recorded_for(model, settings)
    expected, _ = tokens(model, settings)
    for turn in range(2):  # the second run must not see the first one's cache
        got, run = tokens(model, settings, recorded)
        assert got == expected, f"{name}, run {turn}: mask, position or cache of the fixed step is off"
    assert check.first_difference is None and check.distance < 1e-4
    assert run.decode_path == "cuda-graph"
    assert run.finish_reason in ("length", "eos")
    if settings.max_new_tokens > 1:
        assert run.kv_cache_bytes == recorded.fixed.bytes > 0


def test_a_longer_prompt_after_a_shorter_one():
    model = tiny("Llama")
    recorded, _, _ = recorded_for(model)
    longer = PROMPT * 4
    for prompt in (PROMPT, longer, PROMPT):
        run, other = Run(), Run()
        got = [t for t, _ in stream(model, prompt, GREEDY, threading.Event(), run, recorded)]
        assert got == [t for t, _ in stream(model, prompt, GREEDY, threading.Event(), other)]


def test_stop_and_end_of_sequence_end_the_run():
    model = tiny("Llama")
    recorded, _, _ = recorded_for(model)
    whole, _ = tokens(model, GREEDY, recorded)
    cancel, run, got = threading.Event(), Run(), []
    for token, _ in stream(model, PROMPT, GREEDY, cancel, run, recorded):
        got.append(token)
        if len(got) == 3:
            cancel.set()
    assert (got, run.finish_reason) == (whole[:3], "stopped")
    model.generation_config.eos_token_id = whole[4]
    got, run = tokens(model, GREEDY, recorded)
    assert got == whole[: whole.index(whole[4]) + 1] and run.finish_reason == "eos"


def test_overflow_is_named_not_decoded():
    import torch

    model = tiny("Llama")
    recorded, _, _ = recorded_for(model)
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        tokens(model, GREEDY, recorded)
    with torch.no_grad():  # the prefill is fine and the recorded step is not
        recorded.fixed.logits = None
    model = tiny("Llama")
    recorded, _, _ = recorded_for(model)
    forward = recorded.forward
    recorded.forward = lambda: forward() * float("inf")
    with pytest.raises(UserError, match="step 2"):
        tokens(model, GREEDY, recorded)


def test_a_step_that_drops_work_is_caught():
    """What torch.compile did to the ExLlamaV2 kernel: layers that compute nothing."""
    from comparator.decoding.verify import compare, tolerance

    model = tiny("Llama")
    recorded, _, _ = recorded_for(model)
    forward = recorded.forward

    def dropped():
        layer = model.model.layers[1].mlp
        before = layer.forward
        layer.forward = lambda x: x * 0
        try:
            return forward()
        finally:
            layer.forward = before

    recorded.forward = dropped
    check = compare(model, recorded, PROMPT)
    assert check.distance > tolerance(model), "the check would have let a step without its MLP pass"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_rounding_explains_is_measured_on_the_model(dtype):
    import torch

    from comparator.decoding.verify import MOST, compare, explained, one_rounding, tolerance

    model = tiny("Llama").to(getattr(torch, dtype))
    recorded, _, check = recorded_for(model)
    position = int(recorded.fixed.position)
    with torch.inference_mode():
        rounding = one_rounding(model, recorded.fixed)
        far, asked = explained(model, recorded.fixed, 10.0)
    epsilon = torch.finfo(model.dtype).eps
    assert epsilon / 50 < rounding < epsilon * 50, "the noise is not that of one rounding"
    assert asked == rounding and tolerance(model) <= far <= MOST
    assert int(recorded.fixed.position) == position and not any(m._forward_hooks for m in model.modules())
    assert check.wrong is None
    forward = recorded.forward

    def dropped():
        for layer in model.model.layers:
            layer.mlp.forward = lambda x: x * 0
        try:
            return forward()
        finally:
            for layer in model.model.layers:
                del layer.mlp.forward

    recorded.forward = dropped
    assert "rounding explains" in compare(model, recorded, PROMPT).wrong


def test_what_cannot_be_compiled_is_recorded_as_it_is(monkeypatch):
    """Asked for a compiled step that cannot be had, the column takes the plain graph, and says so."""
    from comparator.decoding import Decoder
    from comparator.decoding import compile as decoding_compile

    model = tiny("Llama")
    made = Decoder(model, "cpu")
    made.device = "cuda:0"  # what decides is the device's name; on a CPU “recording” is calling the step

    def refuses(_):
        raise RuntimeError("the compiler gave up")

    monkeypatch.setattr(decoding_compile, "compiled", refuses)
    plan = made.plan(PROMPT, replace(GREEDY, decode="compiled"))
    assert plan.path == "cuda-graph" and "Not compiled" in plan.notes[0] and "gave up" in plan.notes[0]
    assert plan.prepare_s > 0 and made.plan(PROMPT, replace(GREEDY, decode="compiled")).prepare_s is None
    assert not any("ompiled" in n for n in made.plan(PROMPT, GREEDY).notes), "auto did not ask for a compiler"
    monkeypatch.setattr(decoding_compile, "compiled", lambda fixed: fixed.forward)
    made.forget()
    assert made.plan(PROMPT, GREEDY).path == "cuda-graph"
    assert made.plan(PROMPT, replace(GREEDY, decode="compiled")).path == "compiled-cuda-graph"
    assert made.plan(PROMPT, GREEDY).path == "compiled-cuda-graph", "what was compiled before is paid for"


@pytest.mark.parametrize(
    ("name", "word"),
    [("Mamba", "cache"), ("Bloom", "positions"), ("Mistral", "window"), ("Gemma2", "window")],
)
def test_what_cannot_be_captured_says_why(name, word):
    from comparator.decoding.static_state import refusal

    reason = refusal(tiny(name), 256)
    assert reason and word in reason


def test_the_eager_attention_gets_an_additive_mask():
    model = tiny("Llama")
    model.set_attn_implementation("eager")
    recorded, _, check = recorded_for(model)
    assert check.first_difference is None and check.distance < 1e-4
    assert tokens(model, GREEDY, recorded)[0] == tokens(model, GREEDY)[0]


def test_the_plan_on_a_cpu():
    from comparator.decoding import Decoder

    decoder = Decoder(tiny("Llama"), "cpu")
    assert decoder.plan(PROMPT, GREEDY).notes == ()
    asked = decoder.plan(PROMPT, replace(GREEDY, decode="graph"))
    assert asked.path == "eager" and asked.recorded is None
    assert "CUDA" in asked.notes[0], "a wish that is not met must be said"


def test_buckets():
    from comparator.decoding.static_state import bucket

    assert [bucket(n) for n in (1, 256, 257, 1024, 1025, 2176)] == [256, 256, 512, 1024, 2048, 3072]


# ---------------------------------------------------------------- LLM.int8 without the host


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("outliers", [0, 1, 5])
@pytest.mark.parametrize("rows", [1, 4])
def test_int8_without_the_host_is_bitsandbytes_own(dtype, outliers, rows):
    """Each row has its outliers elsewhere: a column with one is left out of the 8-bit product of all rows."""
    import bitsandbytes as bnb
    import torch

    from comparator.backends.bnb.outliers import product

    torch.manual_seed(outliers)
    layer = bnb.nn.Linear8bitLt(128, 96, bias=True, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": torch.randn(96, 128) * 0.05, "bias": torch.randn(96)})
    layer = layer.to("cpu").eval()
    x = torch.randn(rows, 1, 128).clamp(-4, 4)
    for row in x:
        row[..., torch.randperm(128)[:outliers]] = 9.5
    x = x.to(getattr(torch, dtype))
    with torch.inference_mode():
        expected = layer(x)
        got = product(x, layer.state, layer.bias)
    assert got.shape == expected.shape and got.dtype == expected.dtype
    # bitsandbytes' CPU kernel leaves outlier *columns* out as its CUDA kernel does; equal to the last bit.
    assert torch.equal(got, expected), f"off by {(got - expected).abs().max()}"


def tiny_int8():
    import bitsandbytes as bnb
    import torch

    model = tiny("Llama")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    made = bnb.nn.Linear8bitLt(
                        linear.in_features, linear.out_features, False, has_fp16_weights=False, threshold=1.5
                    )
                    made.load_state_dict({"weight": linear.weight.data})
                    setattr(parent, name, made.to("cpu").eval())
    return model


def test_a_whole_int8_model_decodes_on_fixed_addresses():
    """The prompt goes through bitsandbytes' own layers, each later token through the one-row form."""
    model = tiny_int8()
    recorded, notes, check = recorded_for(model)
    assert notes and "outliers" in notes[0]
    assert check.layers is not None and check.layers < 1e-6, (
        "the one-row form is not the layer's own arithmetic"
    )
    assert check.distance < 0.05 and check.wrong is None
    for module in model.modules():
        assert "forward" not in vars(module), "the layer's own forward must be back after recording"


def test_a_batch_of_int8_decodes_on_fixed_addresses(monkeypatch):
    """Every sequence's row has its own outliers; the check of each layer refuses a form that forgets them."""
    import torch

    from comparator.backends.bnb import outliers
    from comparator.decoding.planner import NotCapturable
    from comparator.decoding.timed_batch import record

    prompts = torch.randint(0, 60, (3, 8), generator=torch.Generator().manual_seed(0))
    model = tiny_int8()
    recorded, note = record(model, prompts, 6, compiled=False)
    assert recorded.path == "cuda-graph" and "15 of 15 tokens equal" in note, note
    monkeypatch.setattr(outliers, "add_outliers", lambda out, *_: out)
    with pytest.raises(NotCapturable, match="rewritten for CUDA graphs"):
        record(model, prompts, 6, compiled=False)


def test_a_form_that_forgets_outliers_is_caught(monkeypatch):
    import bitsandbytes as bnb
    import torch

    from comparator.backends.bnb import outliers
    from comparator.decoding import capture_forward

    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 64, False, has_fp16_weights=False, threshold=2.0)
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    model = torch.nn.Sequential(layer.to("cpu").eval())
    x = torch.randn(1, 1, 64)
    x[..., 3] = 9.0
    with torch.inference_mode():
        assert capture_forward.largest_difference(model, lambda: model(x))[1] < 1e-6
        monkeypatch.setattr(outliers, "add_outliers", lambda out, *_: out)
        assert capture_forward.largest_difference(model, lambda: model(x))[1] > 0.05
    assert not layer._forward_hooks


def test_an_adapter_that_is_worn_is_part_of_the_step():
    peft = pytest.importorskip("peft")
    import torch

    from comparator.decoding.static_state import refusal

    model = tiny("Llama")
    plain, _ = tokens(model, GREEDY)
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    injected = peft.inject_adapter_in_model(config, model)
    for injected_model in (injected, peft.get_peft_model(tiny("Llama"), config).eval()):
        assert refusal(injected_model, 256) is None
    injected.eval()
    expected, _ = tokens(injected, GREEDY)
    assert expected != plain, "the adapter does nothing, so this test shows nothing"
    recorded, _, check = recorded_for(injected)
    assert check.first_difference is None
    assert tokens(injected, GREEDY, recorded)[0] == expected


def test_an_adapter_on_int8_is_recorded_too():
    """peft's wrapper has the class name of what it wraps, and none of its state."""
    peft = pytest.importorskip("peft")

    model = tiny_int8()
    model.is_loaded_in_8bit = True  # what from_pretrained leaves; peft looks at it
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    injected = peft.inject_adapter_in_model(config, model).eval()
    wrapped = injected.model.layers[0].self_attn.q_proj
    assert type(wrapped).__name__ == "Linear8bitLt" and type(wrapped).__module__.startswith("peft"), type(
        wrapped
    )
    _, notes, check = recorded_for(injected)
    assert notes and check.layers is not None and check.layers < 1e-6


def test_int8_layers_get_their_own_forward_back():
    import bitsandbytes as bnb
    import torch

    from comparator.decoding import capture_forward

    layers = torch.nn.Sequential(
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=6.0),
        bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, threshold=0.0),
    )
    with capture_forward.capturable(layers) as notes:
        assert notes and "forward" in vars(layers[0]) and "forward" not in vars(layers[1])
    assert not any("forward" in vars(layer) for layer in layers)


# ---------------------------------------------------------------- kernels a compiler must not look into


def test_an_opaque_kernel_survives_compilation():
    import torch

    from comparator.decoding import custom_ops

    class Writes(torch.nn.Module):
        out_features = 8

        def __init__(self):
            super().__init__()
            self.qweight = torch.nn.Parameter(torch.randn(8, 8), requires_grad=False)

        def forward(self, x):
            out = torch.empty(x.shape[0], 8)
            out.numpy()[:] = (x @ self.qweight).numpy()  # a write that the compiler does not see
            return out

    Writes.__module__ = "gptqmodel.stand_in"
    model = torch.nn.Sequential(Writes(), torch.nn.ReLU())
    x = torch.randn(1, 8)
    expected = model(x)
    with custom_ops.opaque_kernels(model):
        compiled = torch.compile(lambda x: model(x), backend="aot_eager", fullgraph=True)
        assert torch.allclose(compiled(x), expected)
    assert "forward" not in vars(model[0])
    assert torch.equal(model(x), expected)


# ---------------------------------------------------------------- on a GPU

cuda = pytest.mark.gpu


@pytest.fixture
def gpu():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda:0"


@cuda
@pytest.mark.parametrize("decode", ["graph", "compiled"])
@pytest.mark.parametrize("settings", [GREEDY, replace(GREEDY, temperature=0.8, top_p=0.9, seed=7)])
def test_a_captured_graph_gives_the_eager_tokens(gpu, decode, settings):
    import torch

    from comparator.decoding import Decoder

    model = tiny("Llama").to(gpu)
    decoder = Decoder(model, gpu)
    plan = decoder.plan(PROMPT, replace(settings, decode=decode))
    assert plan.recorded is not None, plan.notes
    assert plan.path == ("cuda-graph" if decode == "graph" else "compiled-cuda-graph")
    assert tokens(model, settings, plan.recorded)[0] == tokens(model, settings)[0]
    again = decoder.plan(PROMPT, replace(settings, decode=decode))
    assert again.recorded is plan.recorded and again.prepare_s is None
    decoder.forget()
    del plan, again, decoder
    torch.cuda.empty_cache()


@cuda
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("outliers", [0, 1, 7])
@pytest.mark.parametrize("shape", [(4096, 14336), (14336, 4096), (576, 1536)])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_int8_kernel_against_bitsandbytes(gpu, dtype, outliers, shape, rows):
    import bitsandbytes as bnb
    import torch

    from comparator.backends.bnb.outliers import product

    torch.manual_seed(outliers)
    features, outputs = shape
    layer = bnb.nn.Linear8bitLt(features, outputs, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.load_state_dict({"weight": torch.randn(outputs, features) * 0.02})
    layer = layer.to(gpu).eval()
    x = torch.randn(rows, 1, features, device=gpu).clamp(-4, 4)
    for row in x[:5]:
        row[..., torch.randperm(features, device=gpu)[:outliers]] = 11.25
    x = x.to(getattr(torch, dtype))
    with torch.inference_mode():
        expected, got = layer(x).float(), product(x, layer.state).float()
    apart = float((got - expected).norm() / expected.norm())
    assert apart < (1e-3 if dtype == "float16" else 4e-3), f"{apart:.2%} apart: more than one rounding"


@pytest.mark.parametrize("size", [512, 320, 384, 77])
def test_the_best_logit_is_the_first_of_equals(size):
    import torch

    from comparator.decoding.static_state import best

    scores = torch.randn(3, size)
    scores[0, [5, size - 3]] = 9.0
    scores[1, [size // 2, size - 1]] = float("inf")
    scores[2, 7] = float("nan")
    top, place = best(scores)
    assert place.tolist()[:2] == [5, size // 2]
    assert top[0] == 9 and top[1] == float("inf") and top[2].isnan()
    torch.testing.assert_close(place[:2], scores[:2].argmax(-1))
