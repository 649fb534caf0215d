"""Columns executed by llama.cpp: the same work as the others, in a process whose crash ends that column alone."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("xllamacpp", reason="requirements-llamacpp.txt is not installed")

from typer.testing import CliRunner

from comparator.backends import resolve
from comparator.core import document
from comparator.core.errors import Stopped, UserError
from comparator.core.messages import LoadRequest, Prompt
from comparator.core.request import GenerationSettings, Request
from comparator.core.variant import Adapter, Cell
from comparator.engines import get_engine
from comparator.runtimes.llama_cpp.child import Child

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "What is the capital of France?"
NEVER = threading.Event()
GREEDY = GenerationSettings(max_new_tokens=6)


@pytest.fixture(scope="module")
def engine():
    yield get_engine()
    get_engine().unload()


@pytest.fixture(scope="module")
def load(engine, two_layers):
    """load("gguf:bf16") → the resident model of the two-layer model."""

    def loaded(notation: str):
        engine.open(str(two_layers), NEVER)
        return engine.slot(engine.load(LoadRequest(str(two_layers), resolve(notation)), NEVER).handle)

    return loaded


@pytest.fixture(scope="module")
def prompt(engine, two_layers) -> Prompt:
    return engine.encode(str(two_layers), QUESTION, None, None)


def run(
    engine,
    model,
    prompt: Prompt,
    settings: GenerationSettings = GREEDY,
    cancel=NEVER,
    on_chunk=lambda c: None,
):
    return engine.generate(model.handle, prompt, settings, cancel, on_chunk)


def log_softmax(logits) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def kl(reference, other) -> float:
    p, q = log_softmax(reference), log_softmax(other)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


# ---------------------------------------------------------------- the same numbers


def test_the_logits_are_those_of_transformers(load, two_layers):
    import torch
    from transformers import AutoModelForCausalLM

    ids = list(range(1000, 1070))
    with torch.inference_mode():
        model = AutoModelForCausalLM.from_pretrained(two_layers, dtype=torch.float32)
        reference = model(torch.tensor([ids])).logits[0].numpy()
    column = load("gguf:bf16")
    window = column.window_logits(ids, 5, NEVER)
    assert window.shape == (65, 49152) and window.dtype == np.float32
    assert kl(reference[5:], window) < 2e-4, (
        "the file's weights, or the order of its rotary pairs, are not the checkpoint's"
    )
    steps = np.stack(list(column.answer_logits(ids[:40], ids[40:50], NEVER)))
    assert kl(reference[39:49], steps) < 2e-4, "a token's logits are not those before it"
    for rows, piece in column.chunked_logits(ids, 5, 16, NEVER):
        assert kl(window[rows], piece) < 1e-4, "the key-value cache holds something else"
    lost = [
        kl(reference[5:], load(n).window_logits(ids, 5, NEVER)) for n in ("gguf", "gguf:q4_k_m", "gguf:q4_0")
    ]
    assert lost[0] < 0.003 and lost == sorted(lost), f"fewer bits lose more: {lost}"


def test_a_quantized_kv_cache_takes_less_and_loses_more(engine, load, prompt):
    ids = list(range(1000, 1070))
    whole, losses, sizes = load("gguf:bf16").window_logits(ids, 0, NEVER), [], []
    for kind in ("q8_0", "q4_0"):
        column = load(f"gguf:bf16,kv={kind}")
        assert any(f"KV cache in {kind}" in note for note in column.notes)
        losses.append(kl(whole, column.window_logits(ids, 0, NEVER)))
        sizes.append(run(engine, column, prompt).kv_cache_bytes)
    assert 0 < losses[0] < losses[1] < 0.1, losses
    full = run(engine, load("gguf:bf16"), prompt).kv_cache_bytes
    # llama.cpp reports its buffer in MiB with two digits.
    assert sizes == [pytest.approx(full * 34 / 64, abs=2**14), pytest.approx(full * 18 / 64, abs=2**14)]


def test_the_choice_of_tokens_is_that_of_every_column(engine, load, prompt, two_layers):
    """Greedy and sampled answers of the bf16 file, chosen once more from its logits by decoding's own rule."""
    import torch
    from transformers import AutoModelForCausalLM

    from comparator.decoding.sampling import Chooser

    column = load("gguf:bf16")
    model = AutoModelForCausalLM.from_pretrained(two_layers)
    for settings in (
        GREEDY,
        GenerationSettings(max_new_tokens=6, temperature=1.3, top_p=0.9, seed=5, repetition_penalty=1.2),
    ):
        answer = run(engine, column, prompt, settings)
        assert len(answer.token_ids) == 6 and answer.finish_reason == "length" and answer.text
        choose = Chooser(model, settings, len(prompt.token_ids), "cpu")
        ids = list(prompt.token_ids)
        logits = column.answer_logits(prompt.token_ids, answer.token_ids, NEVER)
        for step, (token, row) in enumerate(zip(answer.token_ids, logits, strict=True)):
            assert choose(torch.tensor([ids]), torch.from_numpy(row)[None], step) == token
            ids.append(token)


def test_an_end_of_sequence_token_ends_the_answer(engine, load, prompt, monkeypatch):
    column = load("gguf:bf16")
    first = run(engine, column, prompt).token_ids
    monkeypatch.setattr(column.rules, "ends", frozenset({first[2]}))
    answer = run(engine, column, prompt)
    assert answer.finish_reason == "eos" and answer.token_ids == first[: first.index(first[2]) + 1]


def test_greedy_tokens_are_those_of_llama_cpps_own_server(engine):
    """The built-in file in xllamacpp's Server, in another process, at temperature 0 with the same ids."""
    from comparator.sources.builtin import find_gguf

    prompt = engine.encode("smollm2-135m", QUESTION, None, None)
    script = (
        "import json, sys, xllamacpp as x\n"
        "p = x.CommonParams()\n"
        "p.model.path, p.n_ctx, p.n_parallel, p.cpuparams.n_threads, p.warmup = sys.argv[1], 256, 1, 1, False\n"
        "asked = {'prompt': json.loads(sys.argv[2]), 'max_tokens': 8, 'temperature': 0}\n"
        "print(json.dumps(x.Server(p).handle_completions(asked)['choices'][0]['text']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(find_gguf()[0]), str(list(prompt.token_ids))],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    engine.open("smollm2-135m", NEVER)
    handle = engine.load(LoadRequest("smollm2-135m", resolve("gguf@smollm2-135m")), NEVER).handle
    answer = engine.generate(handle, prompt, GenerationSettings(max_new_tokens=8), NEVER)
    assert answer.text == json.loads(done.stdout.splitlines()[-1])
    assert not answer.notes, "llama.cpp reads this prompt as the same tokens"
    engine.unload(handle)


def test_another_tokenization_is_noted(engine):
    engine.open("smollm2-135m", NEVER)
    handle = engine.load(LoadRequest("smollm2-135m", resolve("gguf@smollm2-135m")), NEVER).handle
    tokenizer = engine.tokenizer_of("smollm2-135m")
    ids = tuple(i for letter in "capital" for i in tokenizer(letter)["input_ids"])
    (note,) = engine.generate(handle, Prompt(ids, False), GenerationSettings(max_new_tokens=1), NEVER).notes
    assert "llama.cpp's own tokenizer reads this prompt as 1 tokens" in note and "position 1" in note
    engine.unload(handle)


# ---------------------------------------------------------------- what is told of it


def test_rows_have_the_checkpoints_names_and_the_files_bytes(load, two_layers):
    from comparator.backends import quantized_type
    from comparator.sources import open_checkpoint

    column = load("gguf:q4_0")
    rows = {row.name: row for row in column.layers()}
    wanted = {t.name for t in open_checkpoint(str(two_layers)).tensors} | {"lm_head.weight"}
    assert set(rows) == wanted, "a tensor cannot be paired with the reference's"
    layer = rows["model.layers.1.mlp.down_proj.weight"]
    assert (layer.logical_dtype, layer.storage_dtype, layer.shape) == ("q4_0", "uint8", (576, 1536))
    assert layer.storage_shape == (576, 1536 // 32 * 18) and layer.bits_per_weight == 4.5
    assert layer.bytes == 576 * 1536 // 32 * 18, "18 bytes for 32 values: 16 of values, 2 of their scale"
    assert rows["model.embed_tokens.weight"].logical_dtype == "q8_0"
    assert rows["lm_head.weight"].tied_to == "model.embed_tokens.weight" and not rows["lm_head.weight"].bytes
    assert rows["model.norm.weight"].logical_dtype == "fp32"
    assert quantized_type("q4_0").bits == 4 and "blocks of 32" in quantized_type("q4_0").words
    total = sum(row.bytes for row in rows.values())
    assert column.memory.weight_bytes == total
    assert abs(column.file.stat().st_size - total) < 10_000, "the rest of the file is its header"
    assert total < column.memory.resident_bytes < total + 60 * 10**6


def test_the_columns_notes_name_threads_features_and_memory(load):
    notes = " ".join(load("gguf:q4_0").describe(True).notes)
    for part in (
        "process of its own",
        "1 thread",
        "mapped from the file",
        "keys and values",
        "compute buffers",
        "Q4_0",
    ):
        assert part in notes, f"{part} is not in the notes: llama.cpp's log may have other words now\n{notes}"
    assert "weight errors" not in notes.lower() and "noise floor" not in notes


@pytest.fixture(scope="module")
def ran(engine, two_layers, tmp_path_factory):
    from comparator.cli import app
    from comparator.fidelity import eval_text

    engine.unload()
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "text.txt").write_text(eval_text.shipped()[:800], encoding="utf-8")
    outputs = [part for end in ("json", "csv", "md", "html") for part in ("-o", str(folder / f"out.{end}"))]
    done = CliRunner().invoke(
        app,
        ["run", "-v", "bf16", "-v", "gguf", "-m", str(two_layers), "-p", QUESTION, "--max-new-tokens", "6",
         "--eval-text", str(folder / "text.txt"), "--context", "64", *outputs],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return done.output, folder


def test_the_document_and_reports_hold_the_column(ran):
    output, folder = ran
    comparison = document.read(folder / "out.json")
    assert document.loads(document.dumps(comparison)) == comparison and "gguf" in output
    cell = comparison.cell("gguf")
    assert cell.status == "ok" and (cell.kernel, cell.decode_path) == ("llama.cpp Q8_0", "llama.cpp")
    assert cell.latency.decode_tok_s > 0 and cell.latency.ttft_s > 0 and cell.latency.load_s > 0
    assert cell.memory.kv_cache_bytes > 0 and cell.memory.run_peak_bytes >= cell.memory.resident_bytes
    assert len(cell.fidelity.prompt.kl) == len(comparison.cell("bf16").token_ids)
    assert 0 < cell.fidelity.text["kl"]["mean"] < 0.01 and "floor" in cell.fidelity.text
    assert comparison.environment.packages["xllamacpp"]
    _, row = csv.DictReader((folder / "out.csv").read_text().splitlines())
    assert row["variant"] == "gguf" and row["weight_bytes"] == str(cell.memory.weight_bytes)
    errors = {row.name: row.error for row in cell.layers}
    assert all(0 < errors[f"model.layers.0.self_attn.{p}_proj.weight"]["relative"] < 0.02 for p in "qkvo"), (
        "queries and keys are compared in another order of their rotary pairs"
    )
    assert errors["model.norm.weight"]["relative"] < 1e-6 and errors["lm_head.weight"]["relative"] < 0.02
    html = (folder / "out.html").read_text()
    assert "llama.cpp Q8_0" in html and "no code to copy for gguf" in html.lower()


def test_on_a_machine_with_a_gpu_the_column_says_that_the_cpu_executes_it(two_layers):
    from comparator.backends.base import Placement
    from comparator.runtimes import runtime_for
    from comparator.sources import open_checkpoint

    variant, checkpoint = resolve("gguf:q4_0"), open_checkpoint(str(two_layers))
    model = runtime_for(variant).load(checkpoint, variant, Placement("cuda:0"), lambda *_: None)
    try:
        loaded = model.describe(True)
        assert model.device == "cpu" and loaded.environment.device == loaded.environment.cpu
        assert "1 thread" in " ".join(loaded.notes)
    finally:
        model.unload()


def test_the_page_shows_it(ran):
    from comparator.ui.results import cards, summary
    from comparator.ui.tabs import layers, memory
    from comparator.ui.view_state import Live

    comparison = document.read(ran[1] / "out.json")
    live, cell = Live.of(comparison), comparison.cell("gguf")
    assert "tok/s" in cards.render(live, live.columns[1], 1) and "gguf" in summary.render(live)
    assert "gguf" in memory.figures_table(comparison)
    assert "q8_0" in layers.summary(cell) and "blocks of 32" in layers.tensor_table(cell)
    assert "21 of 21 tensors differ" in layers.tensor_table(cell, comparison.cells[0])


def test_it_may_be_the_reference(engine, two_layers):
    from comparator.comparison.runner import run as compare

    cells = tuple(Cell(resolve(name)) for name in ("gguf:q4_0", "bf16"))
    request = Request(
        str(two_layers), cells, QUESTION, settings=GenerationSettings(max_new_tokens=3), reference=cells[0]
    )
    itself, other = compare(request, engine=engine, emit=lambda event: None).cells
    assert set(itself.fidelity.prompt.kl) == {0.0} and max(other.fidelity.prompt.kl) > 0
    assert other.fidelity.prompt.token_ids == itself.token_ids
    errors = {row.name: row.error for row in other.layers}
    assert 0.01 < errors["model.layers.1.self_attn.k_proj.weight"]["relative"] < 0.2, (
        "unpacked 4 bits are the original"
    )


def test_what_it_does_not_offer_is_refused_with_the_reason(engine, two_layers):
    from comparator.benchmark import runner as bench
    from comparator.benchmark.types import Options

    with pytest.raises(UserError, match=r"gguf: adapters\. It is executed by llama\.cpp"):
        engine.load(LoadRequest(str(two_layers), resolve("gguf"), Adapter("pirate")), NEVER)
    with pytest.raises(UserError, match="max_memory.*one device"):
        engine.load(LoadRequest(str(two_layers), resolve("gguf"), max_memory={"cpu": 10**10}), NEVER)
    *_, report = bench.run(str(two_layers), [resolve("gguf")], Options())
    assert "llama.cpp executes this variant" in report.rows[0].error


# ---------------------------------------------------------------- Stop, crashes, the end


def test_stop_ends_it_after_a_token_and_inside_the_prompt(engine, load, prompt):
    column, stop = load("gguf:bf16"), threading.Event()
    answer = run(
        engine, column, prompt, GenerationSettings(max_new_tokens=500), stop, lambda chunk: stop.set()
    )
    assert answer.finish_reason == "stopped" and 0 < len(answer.token_ids) < 50
    answer = run(engine, column, Prompt(tuple(range(1000, 1400)), False), GREEDY, stop)
    assert answer.finish_reason == "stopped" and len(answer.token_ids) <= 1
    with pytest.raises(Stopped):
        list(column.answer_logits([1, 2, 3], [4, 5], stop))
    assert len(run(engine, column, prompt).token_ids) == 6, "it works after Stop as before"


def test_a_crash_fails_its_column_alone_and_the_next_run_starts_it_anew(engine, load, prompt):
    column = load("gguf:bf16")
    before, other = run(engine, column, prompt), load("bf16")

    def crash(chunk):
        if column.child.alive:
            os.kill(column.child.pid, signal.SIGSEGV)

    with pytest.raises(UserError, match=r"process of gguf:bf16 ended by signal SIGSEGV") as caught:
        run(engine, column, prompt, GenerationSettings(max_new_tokens=500), NEVER, crash)
    assert "other variants are not affected" in caught.value.advice
    assert run(engine, other, prompt).token_ids
    assert run(engine, column, prompt).token_ids == before.token_ids


def test_unloading_ends_the_process(engine, load):
    column = load("gguf:q4_0")
    pid = column.child.pid
    assert psutil.pid_exists(pid)
    engine.unload(column.handle)
    assert not psutil.pid_exists(pid) and all(r.variant != "gguf:q4_0" for r in engine.state().residents)


def test_what_llama_cpp_refuses_is_said_in_its_words(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(60))
    child = Child("gguf@bad.gguf")
    try:
        with pytest.raises(UserError, match="llama.cpp cannot run gguf@bad.gguf: .*(GGUF|gguf|model)"):
            child.open(tmp_path / "bad.gguf", None, 1, lambda: None)
    finally:
        child.close()


def test_the_process_ends_with_the_app(tmp_path):
    """Also when the app is killed: nothing but the end of its pipe tells the process."""
    script = (
        "import os, time\n"
        "from comparator.runtimes.llama_cpp.child import Child\n"
        "child = Child('x'); child.ask('offloads'); print(child.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    pid = int(parent.stdout.readline())
    assert psutil.pid_exists(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    end = time.monotonic() + 20
    while (
        psutil.pid_exists(pid)
        and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        and time.monotonic() < end
    ):
        time.sleep(0.05)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_an_answer_that_nobody_reads_to_its_end_leaves_the_process_ready(load, prompt):
    column = load("gguf:bf16")
    ids, steps = list(prompt.token_ids), []
    for _ in range(2):
        column.child.ask("use", 300, 1)
        answer = column.child.greedy(ids, 200, frozenset(), 49152, NEVER)
        steps.append([next(answer)[0] for _ in range(3)])
        answer.close()
    assert steps[0] == steps[1], "the second answer got tokens of the first"
