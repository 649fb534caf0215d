"""A runtime without torch (tests/toys/numpy_toy.py) from the command line to the page, with nothing else changed."""

from __future__ import annotations

import csv
import gc
import json
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from comparator import backends
from comparator.backends import resolve
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.messages import LoadRequest, Prompt
from comparator.core.request import GenerationSettings, Request
from comparator.core.variant import Adapter, Cell
from comparator.engines import get_engine

PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def ran(toy, two_layers, tmp_path_factory):
    """(what `run` printed, the folder with its outputs): fp32 and the toy, with fidelity on a text."""
    from comparator.cli import app
    from comparator.fidelity import eval_text

    folder = tmp_path_factory.mktemp("toy")
    (folder / "text.txt").write_text(eval_text.shipped()[:800], encoding="utf-8")
    outputs = [part for end in ("json", "csv", "md", "html") for part in ("-o", str(folder / f"out.{end}"))]
    done = CliRunner().invoke(
        app,
        ["run", "-v", "fp32", "-v", "toy", "-m", str(two_layers), "-p", PROMPT, "--max-new-tokens", "6",
         "--eval-text", str(folder / "text.txt"), "--context", "64", *outputs],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    return done.output, folder


@pytest.fixture(scope="module")
def comparison(ran):
    return document.read(ran[1] / "out.json")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def torch_logits(model: Path, ids: list[int]) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        return loaded(torch.tensor([ids])).logits[0].numpy()


def test_the_document_holds_the_column_and_what_is_missing_is_null(ran, comparison):
    output, folder = ran
    assert document.loads(document.dumps(comparison)) == comparison and "toy" in output
    cell = comparison.cell("toy")
    assert cell.status == "ok" and len(cell.token_ids) == 6 and cell.text and cell.finish_reason == "length"
    assert (cell.kernel, cell.decode_path) == ("numpy matmul", "numpy")
    assert cell.latency.decode_tok_s > 0 and cell.latency.ttft_s > 0 and cell.latency.load_s > 0
    assert cell.memory.resident_bytes == 2 * 4 * 4 * 49152 and cell.layers == ()
    memory = json.loads((folder / "out.json").read_text())["cells"][1]["memory"]
    for key in ("weight_bytes", "run_peak_bytes", "kv_cache_bytes", "load_peak_bytes"):
        assert memory[key] is None, f"{key} was not measured and is not null"
    (note,) = [n for n in cell.notes if n.startswith("Not available from numpy: ")]
    assert "weight errors (" in note and "noise floor (" in note


def test_the_divergence_on_the_answer_is_that_of_numpy(toy, comparison, two_layers):
    engine = get_engine()
    prompt = list(engine.encode(str(two_layers), PROMPT, None, None).token_ids)
    answer = list(comparison.cell("fp32").token_ids)
    ids = (prompt + answer)[:-1]
    e, o = toy.matrices(49152)
    reference = log_softmax(torch_logits(two_layers, ids)[len(prompt) - 1 :])
    column = log_softmax(e[ids[len(prompt) - 1 :]] @ o)
    kl = (np.exp(reference) * (reference - column)).sum(-1)
    measured = comparison.cell("toy").fidelity.prompt
    assert list(measured.token_ids) == answer
    assert measured.kl == pytest.approx(kl, rel=1e-3), "the toy's numpy logits are not what was compared"
    assert measured.p == pytest.approx(np.exp(column[np.arange(len(answer)), answer]), rel=1e-3)


def test_the_perplexity_of_the_text_is_that_of_numpy(ran, toy, comparison, two_layers):
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(two_layers)((ran[1] / "text.txt").read_text())["input_ids"]
    e, o = toy.matrices(49152)
    log_p = log_softmax(e[ids[:-1]] @ o)[np.arange(len(ids) - 1), ids[1:]]
    text = comparison.cell("toy").fidelity.text
    assert text["tokens"] == len(ids) - 1 and text["ppl"] == pytest.approx(np.exp(-log_p.mean()), rel=1e-4)
    assert text["kl"]["mean"] > 1 and "floor" not in text
    assert "floor" in comparison.cell("fp32").fidelity.text


def test_reports_show_it_beside_the_others(ran):
    _, folder = ran
    first, second = csv.DictReader((folder / "out.csv").read_text().splitlines())
    assert second["variant"] == "toy" and second["decode_path"] == "numpy" and second["weight_bytes"] == ""
    assert first["weight_bytes"]
    markdown = (folder / "out.md").read_text()
    assert any(line.startswith("| toy |") and "–" in line for line in markdown.splitlines())
    html = (folder / "out.html").read_text()
    assert "numpy matmul" in html and "no code to copy for toy" in html.lower()


def test_the_page_shows_it(comparison):
    from comparator.ui.form import Shown
    from comparator.ui.results import cards, summary
    from comparator.ui.tabs import fidelity, latency, layers, memory
    from comparator.ui.view_state import Live

    live, shown, cell = Live.of(comparison), Shown(comparison), comparison.cell("toy")
    card = cards.render(live, live.columns[1], 1)
    assert "Not available from numpy" in card and "tok/s" in card
    assert "toy" in summary.render(live)
    assert "numpy" in latency.figures_table(comparison)
    assert "toy" in memory.figures_table(comparison) and "–" in memory.figures_table(comparison)
    assert "toy" in layers.summary(cell) and layers.tensor_table(cell)
    assert layers.tensor_table(cell, comparison.cells[0])
    assert "toy" in fidelity.show(shown)[1] and fidelity.view(shown, "toy")[0]


def test_it_may_be_the_reference(toy, two_layers):
    from comparator.comparison.runner import run

    cells = tuple(Cell(resolve(n)) for n in ("toy", "bf16"))
    request = Request(str(two_layers), cells, PROMPT, settings=GenerationSettings(max_new_tokens=3))
    made = run(replace(request, reference=cells[0]), engine=get_engine(), emit=lambda event: None)
    itself, other = (cell.fidelity for cell in made.cells)
    assert set(itself.prompt.kl) == {0.0} and min(other.prompt.kl) > 0
    assert other.prompt.token_ids == made.cells[0].token_ids
    assert all(row.error is None for row in made.cells[1].layers), "a toy has no weights to compare with"


def test_what_it_does_not_offer_is_refused_with_the_reason(toy, two_layers):
    from comparator.benchmark import runner as bench
    from comparator.benchmark.types import Options
    from comparator.fidelity import sensitivity

    engine, model, toy_variant, never = get_engine(), str(two_layers), resolve("toy"), threading.Event()
    with pytest.raises(UserError, match=r"toy: adapters\. It is executed by numpy: it loads no adapters"):
        engine.load(LoadRequest(model, toy_variant, Adapter("pirate")), never)
    with pytest.raises(UserError, match="max_memory.*one device"):
        engine.load(LoadRequest(model, toy_variant, max_memory={"cpu": 10**10}), never)
    with pytest.raises(UserError, match="sensitivity.*one by one"):
        sensitivity.measure(engine, model, toy_variant, resolve("bf16"), tokens=16)
    with pytest.raises(UserError, match="No adapter can be trained on toy"):
        backends.backend_for(toy_variant).training(toy_variant, "cpu")
    *_, report = bench.run(model, [toy_variant], Options())
    assert "numpy executes this variant" in report.rows[0].error


def test_stop_ends_it_and_unloading_frees_it(toy, two_layers):
    engine, never, stop = get_engine(), threading.Event(), threading.Event()
    engine.open(str(two_layers), never)
    engine.unload()
    handle = engine.load(LoadRequest(str(two_layers), resolve("toy")), never).handle
    (resident,) = engine.state().residents
    assert (resident.variant, resident.bytes) == ("toy", 2 * 4 * 4 * 49152)
    chunks = []
    run = engine.generate(
        handle, Prompt((1, 2, 3), False), GenerationSettings(max_new_tokens=10**6), stop,
        lambda chunk: (chunks.append(chunk), stop.set()),
    )  # fmt: skip
    assert run.finish_reason == "stopped" and 0 < len(run.token_ids) < 10**6
    model = weakref.ref(engine.slot(handle))
    engine.unload(handle)
    gc.collect()
    assert handle in toy.ToyModel.unloaded and model() is None and not engine.state().residents


def test_a_task_of_the_harness_runs_on_it(toy, two_layers) -> None:
    """Its log-probabilities are those of the toy's own matrices."""
    from transformers import AutoTokenizer

    from comparator import api

    folder = Path(__file__).resolve().parents[1] / "comparison" / "tasks" / "tasks"
    result = api.run(
        None, ["toy"], str(two_layers), task=str(folder / "capitals.yaml"), limit=1, fewshot=0, max_new_tokens=1,
        fidelity="none",
    ).prompt_set  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(two_layers)
    prompt = result.prompts[0].prompt
    before = tokenizer(prompt)["input_ids"]
    e, o = toy.matrices(json.loads((two_layers / "config.json").read_text())["vocab_size"])
    for choice in ("Rome", "Paris", "Berlin", "Madrid"):
        ids = tokenizer(f"{prompt} {choice}")["input_ids"]
        log_p = log_softmax(e[ids[len(before) - 1 : -1]] @ o)
        expected = sum(log_p[n, token] for n, token in enumerate(ids[len(before) :]))
        assert f"{expected:.3f}  {choice}" in result.answers[0][0].text
