"""GPTQ on real weights: the built-in model cut to two layers, quantized, saved, loaded by us and by plain
transformers, and compared; ready-made checkpoints and what is refused; Stop and failures that leave nothing."""

from __future__ import annotations

import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import gptq_models
import pytest

from comparator.backends import backend_for, calibration, resolve
from comparator.backends.gptq import ready_made
from comparator.backends.gptqmodel_layers import on_the_spot
from comparator.comparison.runner import compare
from comparator.core.errors import UserError
from comparator.core.events import Done, Loading
from comparator.core.request import GenerationSettings, Request
from comparator.core.settings import get_settings
from comparator.core.variant import Cell
from comparator.engine.local import LocalEngine
from comparator.sources import folder as folders
from comparator.sources import isolated, open_checkpoint, tokenizer

PROMPT = "The capital of France is"
GPTQ = backend_for(resolve("gptq"))


@pytest.fixture(scope="module", autouse=True)
def place(two_layers, tmp_path_factory):
    """Its own cache, so that what is made here is made here. The built-in model comes first: it stays in the shared one."""
    folder = tmp_path_factory.mktemp("gptq")
    with gptq_models.settings_in(folder / "cache"):
        yield folder


@pytest.fixture(scope="module")
def two(two_layers) -> Path:
    return two_layers


@pytest.fixture(scope="module")
def short(place) -> str:
    """The option for a calibration text of a person's own, just long enough."""
    documents = ["\n".join(f"{i} times {k} is {i * k}." for k in range(40)) for i in range(8)]
    return f"cal={calibration.store(documents, get_settings().cache_dir)}"


@pytest.fixture(scope="module")
def engine(place):
    engine = LocalEngine()
    yield engine
    engine.unload()


@pytest.fixture(scope="module")
def first_run(two, engine):
    """(events, column) of the run that quantizes: bf16 beside it."""
    return run(engine, two, "bf16", "gptq")


@pytest.fixture(scope="module")
def folder(first_run, two) -> Path:
    """The checkpoint that the first run made, as `quantize --output` would copy it."""
    checkpoint = open_checkpoint(str(two))
    variant = GPTQ.complete(resolve("gptq"), checkpoint)
    return on_the_spot.folder(checkpoint, GPTQ.recipe(variant), "", get_settings().cache_dir)


def run(engine, model: Path, *variants: str, cancel=None, tokens: int = 8, **changes):
    request = Request(
        str(model),
        tuple(Cell(resolve(v)) for v in variants),
        PROMPT,
        chat=False,
        settings=GenerationSettings(max_new_tokens=tokens),
        fidelity="none",
        **changes,
    )
    events = []
    for event in compare(request, engine=engine, cancel=cancel):
        events.append(event)
    assert isinstance(events[-1], Done)
    return events, events[-1].comparison.cells


def said(events, word: str) -> list[str]:
    return [e.message for e in events if isinstance(e, Loading) and word in e.message]


# ---------------------------------------------------------------- options


def test_the_model_fills_in_the_group_size(builtin):
    assert GPTQ.complete(resolve("gptq"), builtin).notation == "gptq:4bit,g64", (
        "576 = 9 × 64: 128 does not divide it"
    )
    with pytest.raises(UserError) as caught:
        GPTQ.complete(resolve("gptq:g128"), builtin)
    assert "128" in caught.value.problem and "576" in caught.value.problem and "g64" in caught.value.advice


def test_needed_bytes_come_near_what_is_loaded(first_run, two):
    needed = GPTQ.needed_bytes(resolve("gptq"), open_checkpoint(str(two)))
    memory = first_run[1][1].memory
    held = memory.loaded_weight_bytes + memory.loaded_quant_state_bytes
    assert abs(needed - held) < 0.02 * held, (needed, held)


# ---------------------------------------------------------------- on the spot


def test_the_first_run_quantizes_with_progress_and_time_left(first_run):
    events, (reference, column) = first_run
    assert column.status == "ok", column.error
    assert column.variant == "gptq:4bit,g64", "the group size is printed in full once it is known"
    assert said(events, "roughly"), "before it starts it says how long it will take"
    layers = list(dict.fromkeys(said(events, "quantizing layer")))
    assert [m.split(",")[0] for m in layers] == ["quantizing layer 1 of 2", "quantizing layer 2 of 2"]
    assert all(m.endswith("left") for m in layers)
    fractions = [e.fraction for e in events if isinstance(e, Loading) and "quantizing layer" in e.message]
    assert fractions == sorted(fractions) and fractions[-1] > 0.5
    assert column.kernel == "gptqmodel TorchAtenLinear", "the fastest on a CPU that needs no compiler"
    assert reference.status == "ok" and len(column.token_ids) == 8


def test_quantizing_is_neither_load_time_nor_load_peak(first_run):
    events, (reference, column) = first_run
    assert column.latency.load_s < 5, "two layers load in about a second; quantizing them took longer"
    assert column.memory.load_peak_bytes < 6 * reference.memory.weight_bytes


def test_a_second_engine_finds_it_in_the_cache(first_run, two):
    other = LocalEngine()
    events, (column,) = run(other, two, "gptq:4bit,g64")
    other.unload()
    assert not said(events, "quantizing"), "keyed by model, options and calibration: nothing is made twice"
    assert column.token_ids == first_run[1][1].token_ids


def test_what_decides_the_weights_decides_the_folder(two, place):
    checkpoint, cache = open_checkpoint(str(two)), get_settings().cache_dir

    def at(notation: str, cal: str = "") -> Path:
        variant = GPTQ.complete(resolve(notation), checkpoint)
        return on_the_spot.folder(checkpoint, GPTQ.recipe(variant), cal, cache)

    same = [at("gptq"), at("gptq:g64"), at("gptq:kernel=torch"), at("gptq:dtype=bf16")]
    assert len(set(same)) == 1, "kernel and dtype are how it runs, not what it is"
    other = [at("gptq:g32"), at("gptq:8bit"), at("gptq:desc_act"), at("gptq:sym=false"), at("gptq:damp=0.05"),
             at("gptq", "0a1b2c3d"), at("gptq", "c4")]  # fmt: skip
    assert len({*other, same[0]}) == 8


def test_plain_transformers_loads_it_and_gives_the_same_tokens(first_run, folder):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float16, device_map={"": "cpu"},
        quantization_config=GPTQConfig(bits=4, backend="gptq_torch_aten"),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert tuple(output[0, inputs["input_ids"].shape[1] :].tolist()) == first_run[1][1].token_ids


def test_the_logits_are_those_of_the_rounded_weights(folder, two):
    """The kernel against an ordinary float32 model that holds the dequantized weights."""
    import torch
    from transformers import AutoModelForCausalLM, GPTQConfig

    ids = torch.arange(40).unsqueeze(0) * 37 % 1000
    plain = AutoModelForCausalLM.from_pretrained(two, dtype=torch.float32)
    original = plain(ids).logits
    packed = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float16,
        quantization_config=GPTQConfig(bits=4, backend="gptq_torch"),
        device_map="cpu",
    )
    for module in packed.modules():
        vars(module).pop("dequantize_weight", None)
    for name, module in packed.named_modules():
        if (weight := GPTQ.dequantize(module)) is not None:
            before = plain.get_submodule(name).weight.data
            error = float((weight - before).norm() / before.norm())
            assert error < 0.2, (
                f"{name}: relative error {error:.2f}; a zero point is off by one, or groups are mixed up"
            )
            plain.get_submodule(name).weight.data = weight
    with torch.no_grad():
        expected, got = plain(ids).logits, packed(ids).logits.float()
    assert (got - expected).abs().max() < 0.02 * expected.abs().max(), "beyond what float16 rounds"
    assert (got - original).abs().mean() > 2 * (got - expected).abs().mean(), (
        "this test would not see quantizing"
    )


def test_the_cpu_kernels_agree(first_run, two, engine):
    _, (torch_column, bf16_column) = run(engine, two, "gptq:kernel=torch", "gptq:dtype=bf16")
    assert torch_column.status == bf16_column.status == "ok"
    assert (
        torch_column.kernel == "gptqmodel TorchLinear" and bf16_column.kernel == "gptqmodel TorchAtenLinear"
    )
    assert torch_column.token_ids == first_run[1][1].token_ids
    assert {r.storage_dtype for r in bf16_column.layers if r.name.endswith("norm.weight")} == {"bf16"}


def test_a_layer_that_cannot_be_packed_stays_and_transformers_knows(place, tmp_path):
    source = gptq_models.tiny(
        tmp_path / "odd", "llama", hidden_size=64, intermediate_size=144
    )  # 144 = 4.5 × 32
    target = gptq_models.quantized(source, tmp_path / "odd-gptq", 4, 32)
    config = json.loads((target / "config.json").read_text())["quantization_config"]
    kept = sum(config["modules_in_block_to_quantize"], [])
    assert "self_attn.q_proj" in kept and not any("mlp" in name for name in kept)
    engine = LocalEngine()
    _, (column,) = run(engine, source, f"gptq@{target}")
    engine.unload()
    assert column.status == "ok", column.error
    stored = {row.name.rsplit(".", 2)[-2]: row.logical_dtype for row in column.layers}
    assert stored["q_proj"] == "int4 (GPTQ)" and stored["gate_proj"] == "fp16"


# ---------------------------------------------------------------- tables


def test_layers_show_codes_and_state_and_add_up(two, engine, folder):
    from safetensors import safe_open

    _, (column,) = run(engine, two, "gptq:kernel=torch")
    row = next(r for r in column.layers if r.name.endswith("0.mlp.down_proj.qweight"))
    assert (row.logical_dtype, row.storage_dtype, row.shape) == ("int4 (GPTQ)", "int32", (576, 1536))
    assert row.storage_shape == (192, 576), "eight 4-bit codes in an int32"
    assert {s.name for s in row.state} >= {"qzeros", "scales", "g_idx"}
    groups = 1536 // 64
    state = groups * 576 * 2 + groups * 576 // 2 + 1536 * 4  # scales, zeros, g_idx
    assert row.quant_state_bytes == state
    assert row.bits_per_weight == pytest.approx(8 * (576 * 1536 / 2 + state) / (576 * 1536))
    with safe_open(folder / "model.safetensors", "pt") as file:
        sizes = {n: file.get_tensor(n).numel() * file.get_tensor(n).element_size() for n in file.keys()}
    held = column.memory.weight_bytes + column.memory.quant_state_bytes
    assert held == sum(sizes.values()), "to the byte what the file holds"
    assert column.memory.quant_state_bytes == sum(
        n for k, n in sizes.items() if k.endswith(("qzeros", "scales", "g_idx"))
    )


def test_what_the_cpu_kernel_rearranges_is_told(first_run):
    column = first_run[1][1]
    changed = [row for row in column.layers if row.loaded]
    assert (
        len(changed) == 14
        and changed[0].loaded.storage_dtype == "int32"
        and changed[0].storage_dtype == "uint8"
    )
    assert any("Repacked at first use" in note for note in column.notes)
    assert column.memory.quant_state_bytes > column.memory.loaded_quant_state_bytes, (
        "bf16 offsets beside the scales"
    )


def test_both_layouts_unpack_to_the_same_weights(folder):
    import torch
    from transformers import AutoModelForCausalLM, GPTQConfig

    found = []
    for name in ("gptq_torch", "gptq_torch_aten"):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float16,
            quantization_config=GPTQConfig(bits=4, backend=name),
            device_map="cpu",
        ).eval()
        layer = model.model.layers[1].self_attn.v_proj
        vars(layer).pop("dequantize_weight", None)
        with torch.inference_mode():
            layer(torch.randn(1, 576, dtype=torch.float16))  # the first use rearranges
        found.append(GPTQ.dequantize(layer))
    assert (found[0] - found[1]).norm() < 0.01 * found[0].norm(), "only scales go from fp16 to bf16"


# ---------------------------------------------------------------- ready-made


def test_a_folder_loads_and_shows_what_it_is(folder, first_run, two, engine):
    events, (column,) = run(engine, two, f"gptq@{folder}:kernel=torch_aten")
    assert column.status == "ok", column.error
    assert column.variant.endswith(":4bit,g64,kernel=torch_aten")
    assert resolve(column.variant).notation == column.variant
    assert column.token_ids == first_run[1][1].token_ids and not said(events, "quantizing")


def test_autogptqs_older_layout_loads(folder, first_run, two, engine, tmp_path):
    legacy = gptq_models.to_legacy(folder, tmp_path / "legacy")
    before = sorted(p.name for p in legacy.iterdir())
    _, (column,) = run(engine, two, f"gptq@{legacy}")
    assert column.status == "ok", column.error
    assert column.variant.endswith(":4bit,g64") and column.token_ids == first_run[1][1].token_ids
    assert sorted(p.name for p in legacy.iterdir()) == before, "somebody else's folder is left as it is"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("8bit", ["bits=8", "4bit"]),
        ("4bit,g32", ["group=32", "g64"]),
        ("desc_act", ["desc_act"]),
        ("sym=false", ["sym=false", "sym=true"]),
        ("cal=c4", ["cal=c4"]),
        ("damp=0.2", ["damp=0.2"]),
    ],
)
def test_a_wish_that_contradicts_the_checkpoint_is_refused_by_name(folder, two, options, words):
    with pytest.raises(UserError) as caught:
        GPTQ.complete(resolve(f"gptq@{folder}:{options}"), open_checkpoint(str(two)))
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_another_model_is_refused_before_loading(folder, builtin, tmp_path, two):
    with pytest.raises(UserError) as caught:
        GPTQ.complete(resolve(f"gptq@{folder}"), builtin)
    assert "num_hidden_layers" in caught.value.problem and "30" in caught.value.problem
    source = gptq_models.tiny(tmp_path / "mistral", "mistral")
    with pytest.raises(UserError) as caught:
        GPTQ.complete(resolve(f"gptq@{folder}"), open_checkpoint(str(source)))
    assert "MistralForCausalLM" in caught.value.problem and "LlamaForCausalLM" in caught.value.problem


def test_another_tokenizer_is_a_warning(folder, two, tmp_path, engine):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    file = other / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    one, two_ = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[two_] = vocabulary[two_], vocabulary[one]
    file.write_text(json.dumps(tokenizer))
    _, (column,) = run(engine, two, f"gptq@{other}")
    assert column.status == "ok"
    assert any("different tokenizer" in note and "2 of" in note for note in column.notes), column.notes


def test_what_is_not_gptq_is_said(two, folder, tmp_path):
    cases = {}
    cases["not quantized"] = two
    awq = tmp_path / "awq"
    shutil.copytree(folder, awq)
    gptq_models.change_config(awq, quantization_config={"quant_method": "awq", "bits": 4})
    cases["awq"] = awq
    five = tmp_path / "five"
    shutil.copytree(folder, five)
    gptq_models.change_config(five, quantization_config={"quant_method": "gptq", "bits": 5, "group_size": 64})
    cases["bits=5"] = five
    for words, place in cases.items():
        with pytest.raises(UserError) as caught:
            GPTQ.complete(resolve(f"gptq@{place}"), open_checkpoint(str(two)))
        assert words in caught.value.problem


def test_missing_parts_are_named(folder, two, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    lame = tmp_path / "lame"
    shutil.copytree(folder, lame, ignore=shutil.ignore_patterns("model.safetensors"))
    kept = {k: v for k, v in tensors.items() if k != "model.layers.1.mlp.up_proj.g_idx"}
    save_file(kept, lame / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError) as caught:
        ready_made.open_ready(resolve(f"gptq@{lame}"))
    assert "g_idx" in caught.value.problem and "layers.1.mlp.up_proj" in caught.value.problem

    sharded = tmp_path / "sharded"
    shutil.copytree(folder, sharded, ignore=shutil.ignore_patterns("model.safetensors"))
    index = {"weight_map": dict.fromkeys(tensors, "model-00002-of-00002.safetensors")}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError) as caught:
        ready_made.open_ready(resolve(f"gptq@{sharded}"))
    assert "model-00002-of-00002.safetensors" in str(caught.value)


def test_a_quantized_model_is_not_quantized_again(folder):
    with pytest.raises(UserError) as caught:
        GPTQ.complete(resolve("gptq"), open_checkpoint(str(folder)))
    assert "quantized already" in caught.value.problem and "gptq@" in caught.value.advice


# ---------------------------------------------------------------- kernels


def test_a_kernel_that_cannot_run_fails_its_column_before_any_work(two, engine):
    if not _cpu_only():
        pytest.skip("there is a GPU here")
    events, (column,) = run(engine, two, "gptq:2bit,kernel=triton")
    assert column.status == "failed" and "triton" in column.error.problem and "torch" in column.error.advice
    assert not said(events, "quantizing"), "minutes of work for a kernel that cannot run"


def _cpu_only() -> bool:
    import torch

    return not torch.cuda.is_available()


# ---------------------------------------------------------------- Stop and failure


def leftovers(place: Path) -> list[str]:
    """Everything in the cache's gptq folder but locks and what earlier tests made."""
    root = place / "cache" / "gptq"
    return sorted(p.name for p in root.iterdir() if p.name != ".locks") if root.exists() else []


def test_stop_between_two_layers_leaves_nothing(two, engine, place, short):
    before, cancel = leftovers(place), threading.Event()
    request = Request(
        str(two), (Cell(resolve("bf16")), Cell(resolve(f"gptq:8bit,{short}"))), PROMPT, chat=False,
        settings=GenerationSettings(max_new_tokens=4), fidelity="none",
    )  # fmt: skip
    cells = ()
    for event in compare(request, engine=engine, cancel=cancel):
        if isinstance(event, Loading) and event.message.startswith("quantizing layer 2"):
            cancel.set()
        if isinstance(event, Done):
            cells = event.comparison.cells
    assert [c.status for c in cells] == ["ok", "stopped"]
    assert leftovers(place) == before, "a stopped run leaves nothing behind"


def test_a_full_disk_is_said_and_leaves_nothing(two, engine, place, short):
    """The real limit of a process on the size of its files stands in for the disk."""
    import resource

    before = leftovers(place)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        _, cells = run(engine, two, "bf16", f"gptq:2bit,{short}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    assert [c.status for c in cells] == ["ok", "failed"], "the other column is unharmed"
    assert "disk" in cells[1].error.problem.lower() or "space" in cells[1].error.advice.lower(), cells[
        1
    ].error
    assert leftovers(place) == before


def test_calibration_that_is_too_short_fails_the_column_before_the_model_is_loaded(two, engine, place):
    name = calibration.store(["Far too short to calibrate anything."], get_settings().cache_dir)
    before = leftovers(place)
    _, cells = run(engine, two, "bf16", f"gptq:cal={name}")
    assert [c.status for c in cells] == ["ok", "failed"]
    assert "tokens" in cells[1].error.problem and "1,024" in cells[1].error.problem
    assert leftovers(place) == before


def test_calibration_that_is_not_here_is_said(two, engine):
    _, (column,) = run(engine, two, "gptq:cal=00c0ffee")
    assert column.status == "failed"
    assert "cal=00c0ffee" in column.error.problem and "--calibration" in column.error.advice


def test_a_text_of_ones_own_shows_in_the_notation_and_changes_the_weights(two, engine, folder):
    documents = ["\n".join(f"{i} times {k} is {i * k}." for k in range(40)) for i in range(8)]
    variant = calibration.applied_to(resolve("gptq"), documents)
    assert variant.notation.startswith("gptq:cal=")
    _, (column,) = run(engine, two, variant.notation)
    assert (
        column.status == "ok" and column.variant == f"gptq:4bit,g64,{variant.notation.removeprefix('gptq:')}"
    )
    other = on_the_spot.folder(
        open_checkpoint(str(two)),
        GPTQ.recipe(resolve("gptq:g64")),
        dict(variant.options)["cal"],
        get_settings().cache_dir,
    )
    assert (other / "model.safetensors").read_bytes() != (folder / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- max_memory


def test_max_memory_is_kept_and_shown(two, engine):
    if not _cpu_only():
        pytest.skip("there is a GPU here")
    _, cells = run(engine, two, "bf16", "gptq", "nf4", max_memory="cpu=2GiB")
    assert all(c.status == "ok" for c in cells), [c.error for c in cells]
    assert {row.device for c in cells for row in c.layers} == {"cpu"}
    _, cells = run(engine, two, "bf16", "gptq", max_memory="cpu=10MB")
    assert all("max_memory" in c.error.problem and "10 MB" in c.error.problem for c in cells)
    _, cells = run(engine, two, "bf16", max_memory="0=1GiB,cpu=2GiB")
    assert "GPU 0" in cells[0].error.problem


# ---------------------------------------------------------------- the whole model


@pytest.mark.slow
def test_the_whole_model_answers_paris_and_comes_near(builtin, place, tmp_path):
    """Minutes. KL divergence against bf16 on the evaluation text, which was no calibration: at most 1.25 × nf4's
    with groups of 64, below nf4's with groups of 32. The code of a column then gives the same tokens."""
    import subprocess
    import sys

    from comparator.cli.quantize import copy
    from comparator.reporting.snippet import snippet

    engine = LocalEngine()
    request = Request(
        "smollm2-135m",
        tuple(Cell(resolve(v)) for v in ("bf16", "gptq:g64", "gptq:g32", "nf4")),
        "What is the capital of France?",
        settings=GenerationSettings(max_new_tokens=16),
        fidelity="text",
    )
    comparison = list(compare(request, engine=engine))[-1].comparison
    engine.unload()
    assert comparison.ok, [c.error for c in comparison.cells]
    kl = {c.variant: c.fidelity.text["kl"]["mean"] for c in comparison.cells}
    print("mean KL divergence against bf16, nats:", kl)
    assert kl["gptq:4bit,g64"] <= 1.25 * kl["nf4"]
    assert kl["gptq:4bit,g32"] < kl["nf4"]
    column = comparison.cell("gptq:4bit,g64")
    assert "Paris" in column.text

    checkpoint = open_checkpoint("smollm2-135m")
    variant = resolve(column.variant)
    source = on_the_spot.folder(checkpoint, GPTQ.recipe(variant), "", get_settings().cache_dir)
    code = snippet(replace(column), comparison)
    copy(source, tmp_path / "gptq-4bit-g64")
    script = tmp_path / "snippet.py"
    script.write_text(code + "\nprint(new_tokens)\n")
    import os

    env = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(list(column.token_ids)) in done.stdout


def test_a_strangers_tokenizer_makes_the_samples_in_another_process(
    two, short, settings_env, monkeypatch, tmp_path
):
    settings_env(public=1)
    monkeypatch.setattr(tokenizer, "read_tokenizer", lambda path: pytest.fail("it was read in this process"))
    checkpoint = folders.inspect(two, "someone/model", revision="a" * 40)
    variant = GPTQ.complete(resolve(f"gptq:{short}"), checkpoint)
    made = on_the_spot.make(
        checkpoint,
        GPTQ.recipe(variant),
        short.removeprefix("cal="),
        get_settings().cache_dir,
        "cpu",
        lambda *_: None,
    )
    assert (made / "tokenizer.json").read_bytes() == (two / "tokenizer.json").read_bytes()
    assert folders.inspect(made, "made").quantization
    isolated.process.close()
