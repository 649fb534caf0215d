"""AWQ on the spot: real weights cut to one layer, quantized, kept, loaded by us and by plain transformers; how what comes
before a layer is found in several architectures; Stop and failures that leave nothing."""

from __future__ import annotations

import threading
from pathlib import Path

import awq_models
import gptq_models
import pytest
import tiny_models

from comparator.backends import backend_for, calibration, resolve
from comparator.backends.awq import quantize
from comparator.backends.awq.layer import Recipe
from comparator.backends.gptqmodel_layers import on_the_spot, walk
from comparator.comparison.runner import compare
from comparator.core.errors import UserError
from comparator.core.events import Done, Loading
from comparator.core.request import GenerationSettings, Request
from comparator.core.settings import get_settings
from comparator.core.variant import Cell
from comparator.engine.local import LocalEngine
from comparator.sources import open_checkpoint

PROMPT = "The capital of France is"
AWQ = backend_for(resolve("awq"))


@pytest.fixture(scope="module", autouse=True)
def place(two_layers, tmp_path_factory):
    """Its own cache, so that what is made here is made here."""
    folder = tmp_path_factory.mktemp("awq")
    with gptq_models.settings_in(folder / "cache"):
        yield folder


@pytest.fixture(scope="module")
def engine(place):
    engine = LocalEngine()
    yield engine
    engine.unload()


@pytest.fixture(scope="module")
def tiny(place) -> Path:
    tiny_models.save(place / "tiny", "llama", hidden_size=64, intermediate_size=128)
    return place / "tiny"


def run(engine, model: Path, *variants: str, cancel=None, stop_at: str = "-"):
    request = Request(
        str(model), tuple(Cell(resolve(v)) for v in variants), PROMPT, chat=False,
        settings=GenerationSettings(max_new_tokens=8), fidelity="none",
    )  # fmt: skip
    events = []
    for event in compare(request, engine=engine, cancel=cancel):
        events.append(event)
        if isinstance(event, Loading) and event.message.startswith(stop_at):
            cancel.set()
    assert isinstance(events[-1], Done)
    return events, events[-1].comparison


@pytest.fixture(scope="module")
def one_layer(two_layers, place) -> Path:
    return tiny_models.cut(two_layers, place / "one-layer", 1)


@pytest.fixture(scope="module")
def first_run(one_layer, engine):
    """(events, comparison) of the run that quantizes: bf16 beside it."""
    return run(engine, one_layer, "bf16", "awq")


@pytest.fixture(scope="module")
def folder(first_run, one_layer) -> Path:
    return made(one_layer, "awq")


def made(model: Path, notation: str, cal: str = "") -> Path:
    """Where the checkpoint of a variant is kept."""
    checkpoint = open_checkpoint(str(model))
    recipe = AWQ.recipe(AWQ.complete(resolve(notation), checkpoint))
    return on_the_spot.folder(checkpoint, recipe, cal, get_settings().cache_dir)


def load(folder: Path, backend: str = "torch_awq", dtype: str = "float16"):
    import torch
    from transformers import AutoModelForCausalLM, AwqConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), device_map="cpu", quantization_config=AwqConfig(backend=backend)
    )


def full(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


# ---------------------------------------------------------------- the column


def test_the_first_run_quantizes_with_progress_and_time_left(first_run):
    events, comparison = first_run
    column = comparison.cells[1]
    assert column.status == "ok", column.error
    assert column.variant == "awq:g64" and column.kernel == "gptqmodel TorchAtenAwqLinear"
    said = [e for e in events if isinstance(e, Loading) and "quantizing" in e.message]
    layers = list(dict.fromkeys(e.message for e in said if "quantizing layer" in e.message))
    assert [m.split(",")[0] for m in layers] == ["quantizing layer 1 of 1"]
    fractions = [e.fraction for e in said]
    assert (
        any("roughly" in e.message for e in said) and fractions == sorted(fractions) and fractions[-1] > 0.5
    )
    assert column.latency.load_s < 5, "one layer loads in about a second; quantizing them took longer"


def test_a_second_engine_finds_it_in_the_cache(first_run, one_layer):
    other = LocalEngine()
    events, comparison = run(other, one_layer, "awq:g64")
    other.unload()
    assert not [e for e in events if isinstance(e, Loading) and "quantizing" in e.message]
    assert comparison.cells[0].token_ids == first_run[1].cells[1].token_ids


def test_plain_transformers_loads_it_and_gives_the_same_tokens(first_run, folder):
    from transformers import AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    output = load(folder, "auto").generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tuple(output[0, inputs["input_ids"].shape[1] :].tolist()) == first_run[1].cells[1].token_ids


def test_it_loads_as_a_source_too(first_run, folder, one_layer, engine):
    column = run(engine, one_layer, f"awq@{folder}")[1].cells[0]
    assert column.variant == f"awq@{folder}:g64" and column.token_ids == first_run[1].cells[1].token_ids


def test_needed_bytes_come_near_what_is_loaded(first_run, one_layer):
    needed = AWQ.needed_bytes(resolve("awq"), open_checkpoint(str(one_layer)))
    memory = first_run[1].cells[1].memory
    held = memory.loaded_weight_bytes + memory.loaded_quant_state_bytes
    assert abs(needed - held) < 0.03 * held, (needed, held)


def test_it_comes_nearer_than_rounding_alone(first_run, folder, one_layer, tmp_path):
    """KL divergence of the next token on a text that was no calibration."""
    import torch
    from transformers import AutoTokenizer

    awq_models.quantized(one_layer, tmp_path / "rounded", 4, 64)
    text = "It was the best of times, it was the worst of times, and nobody knew why the mill by the river had stopped."
    ids = AutoTokenizer.from_pretrained(one_layer)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = full(one_layer)(ids).logits.log_softmax(-1)
        found = [load(f)(ids).logits.float().log_softmax(-1) for f in (folder, tmp_path / "rounded")]
    scaled, alone = (float((expected.exp() * (expected - f)).sum(-1).mean()) for f in found)
    assert scaled < 0.75 * alone, (scaled, alone)


def test_what_decides_the_weights_decides_the_folder(first_run, one_layer):
    same = {made(one_layer, n) for n in ("awq", "awq:g64", "awq:kernel=torch", "awq:dtype=bf16")}
    other = {made(one_layer, n) for n in ("awq:g32", "awq:8bit", "awq:sym=true")} | {
        made(one_layer, "awq", "c4")
    }
    assert len(same) == 1 and len(same | other) == 5


def test_the_code_points_at_what_quantize_writes(first_run, one_layer):
    variant = resolve("awq:g64,kernel=torch")
    comment = "\n".join(AWQ.code_comment(variant, "a b\nimport os"))
    assert "quantize" in comment and "--output awq-g64-kernel-torch" in comment
    assert all(line.startswith("#") for line in comment.splitlines())
    assert AWQ.code_weights(variant) == "'awq-g64-kernel-torch'"


# ---------------------------------------------------------------- what is packed


def quantized(source: Path, target: Path, recipe: Recipe) -> Path:
    from transformers import AutoTokenizer

    target.mkdir()
    samples = [[(7 * i + k) % 300 for i in range(48)] for k in range(8)]
    recipe.quantize(full(source), samples, target, AutoTokenizer.from_pretrained(source), lambda *_: None)
    return target


@pytest.mark.parametrize(
    "recipe",
    [Recipe(2, 64), Recipe(3, 32), Recipe(4, 64), Recipe(4, -1), Recipe(4, 32, sym=True), Recipe(8, 64)],
    ids=str,
)
def test_every_recipe_packs_what_it_rounded(tiny, tmp_path, recipe):
    """Random weights: the output has to be off by what so many bits cost, and the kernel to multiply what is stored."""
    import torch

    model, plain = load(quantized(tiny, tmp_path / "made", recipe)), full(tiny)
    ids, count = torch.arange(40).unsqueeze(0), 0
    with torch.no_grad():
        for module in model.modules():
            if (weight := AWQ.dequantize(module)) is None:
                continue
            count += 1
            x = torch.randn(3, module.in_features, dtype=torch.float16)
            assert torch.allclose(module(x).float(), x.float() @ weight.T, atol=0.02)
        expected, got = plain(ids).logits, model(ids).logits.float()
    assert count == 14, "seven layers in each of two blocks"
    error = float((got - expected).norm() / expected.norm())
    assert error < {2: 0.6, 3: 0.35, 4: 0.15, 8: 0.015}[recipe.bits], error


@pytest.mark.parametrize(
    ("family", "sizes", "found"),
    [
        ("llama", {}, {"q_proj": True, "o_proj": False, "gate_proj": True, "down_proj": True}),
        (
            "llama",
            {"num_key_value_heads": 4},
            {"q_proj": True, "o_proj": True, "gate_proj": True, "down_proj": True},
        ),
        (
            "gemma",
            {"head_dim": 16, "num_key_value_heads": 4},
            {"q_proj": True, "o_proj": True, "gate_proj": True},
        ),
        ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 128}, {"q_proj": True, "fc1": True, "fc2": True}),
        ("gpt_neox", {}, {"query_key_value": True, "dense_h_to_4h": True, "dense_4h_to_h": False}),
        ("mixtral", {}, {"q_proj": True, "o_proj": False}),
    ],
    ids=["llama", "llama with as many key heads", "gemma", "opt", "gpt_neox", "mixtral"],
)
def test_what_comes_before_a_layer_is_found_by_trying_it(tmp_path, family, sizes, found):
    """Scaling what was found by other factors than those of the search leaves the whole model's logits as they are."""
    import torch

    tiny_models.save(tmp_path, family, **{"hidden_size": 64, "intermediate_size": 128, **sizes} if family != "opt" else
                     {"hidden_size": 64, **sizes})  # fmt: skip
    model, ids = full(tmp_path), torch.arange(24).unsqueeze(0) * 5 % 300
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        expected = model(ids).logits
        block = walk.find_blocks(model)[0]
        inputs, extra = walk.first_inputs(model, block, [ids[0].tolist()], "cpu")
        groups = walk.in_order(block, walk.linears(block, 32), inputs[0], extra[0])
        for group in groups:
            own = {layer.name.rpartition(".")[2] for layer in group}
            divide = quantize._what_comes_before(block, group, inputs[0], extra[0])
            for name in own & set(found):
                assert (divide is not None) == found[name], name
            assert torch.equal(model(ids).logits, expected), "trying leaves nothing behind"
            if divide is not None:
                scale = torch.rand(group[0].inputs, generator=generator) + 0.5
                divide(scale)
                for layer in group:
                    layer.module.weight.mul_(scale)
                got = model(ids).logits
                assert torch.allclose(got, expected, atol=1e-4 * float(expected.abs().max())), own
                expected = got
        assert set(found) <= {layer.name.rpartition(".")[2] for group in groups for layer in group}


@pytest.mark.parametrize(
    ("family", "sizes"), [("gpt_neox", {}), ("opt", {"word_embed_proj_dim": 64, "ffn_dim": 128})]
)
def test_other_architectures_load_and_come_near(tmp_path, engine, family, sizes):
    """Biases, and the scale that transformers expects behind some activation functions."""
    source = tmp_path / family
    tiny_models.save(source, family, hidden_size=64, **sizes)
    column = run(engine, source, "awq:8bit,g32")[1].cells[0]
    assert column.status == "ok", column.error
    import torch

    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        one, other = full(source)(ids).logits, load(made(source, "awq:8bit,g32"))(ids).logits.float()
    assert (one - other).abs().max() < 0.05 * one.abs().max(), "8 bits should hardly show"


def test_a_layer_that_cannot_be_packed_stays_and_the_config_says_so(tmp_path, engine):
    source = tmp_path / "odd"
    tiny_models.save(source, "llama", hidden_size=64, intermediate_size=144)  # 144 = 4.5 × 32
    column = run(engine, source, "awq:g32")[1].cells[0]
    assert column.status == "ok", column.error
    stored = {row.name.rsplit(".", 2)[-2]: row.logical_dtype for row in column.layers}
    assert stored["q_proj"] == "int4 (AWQ)" and stored["gate_proj"] == stored["down_proj"] == "fp16"


# ---------------------------------------------------------------- refused, stopped


def leftovers(place: Path) -> list[str]:
    root = place / "cache" / "awq"
    return sorted(p.name for p in root.iterdir() if p.name != ".locks") if root.exists() else []


def test_stop_between_one_layer_leaves_nothing(tiny, engine, place):
    before, cancel = leftovers(place), threading.Event()
    _, comparison = run(engine, tiny, "bf16", "awq:3bit", cancel=cancel, stop_at="quantizing layer 2")
    assert [c.status for c in comparison.cells] == ["ok", "stopped"] and leftovers(place) == before


def test_calibration_that_is_too_short_fails_the_column(tiny, engine, place):
    name = calibration.store(["Far too short to calibrate anything."], get_settings().cache_dir)
    before = leftovers(place)
    column = run(engine, tiny, f"awq:cal={name}")[1].cells[0]
    assert column.status == "failed" and "tokens" in column.error.problem and leftovers(place) == before


def test_what_cannot_be_made_is_refused_before_any_work(tmp_path, folder, one_layer):
    def refused(action, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            action()
        assert caught.value.advice and all(word in str(caught.value) for word in words), str(caught.value)

    tiny_models.save(tmp_path / "gpt2", "gpt2", n_embd=64)
    refused(
        lambda: AWQ.complete(resolve("awq"), open_checkpoint(str(tmp_path / "gpt2"))),
        "GPT2LMHeadModel",
        "nf4",
    )
    refused(
        lambda: AWQ.complete(resolve("awq"), open_checkpoint(str(folder))),
        "quantized already",
        f"awq@{folder}",
    )
    checkpoint = open_checkpoint(str(one_layer))
    refused(lambda: AWQ.complete(resolve("awq:g128"), checkpoint), "128", "576", "g64")
    refused(lambda: AWQ.complete(resolve(f"awq@{folder}:cal=c4"), checkpoint), "cal=c4", "quantized already")
    refused(lambda: resolve("awq:cal=my.txt"), "cal=my.txt", "--calibration")
