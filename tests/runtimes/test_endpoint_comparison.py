"""A server as a column of a comparison beside the toy: what is known of its divergence, and where it is shown."""

from __future__ import annotations

import csv
import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import tiny_models
from openai_server import OpenAIServer, bigram
from typer.testing import CliRunner

from comparator.backends import resolve
from comparator.comparison.runner import run
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.request import EvalSettings, GenerationSettings, Request
from comparator.core.settings import get_settings
from comparator.core.variant import Cell
from comparator.engines import get_engine
from comparator.fidelity import eval_text
from comparator.metrics.definitions import METRICS

PROMPT = "What is the capital?"
TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_models.save(folder, chat=True)
    return str(folder)


@pytest.fixture(scope="module")
def compared(toy, model):
    """`compared(scale=0.8, top=20, …)`: the toy and a server of the same model, its logits times `scale`."""
    tokenizer, matrices = tiny_models.tokenizer(chat=True), toy.matrices(tiny_models.VOCABULARY)

    def compare(scale: float = 1.0, fidelity: str = "prompt", reference: int = 0, **how):
        server = OpenAIServer(tokenizer, bigram(matrices, scale), **how)
        cells = tuple(Cell(resolve(n)) for n in ("toy", "endpoint@tiny"))
        request = Request(
            model,
            cells,
            PROMPT,
            settings=GenerationSettings(max_new_tokens=TOKENS),
            fidelity=fidelity,
            evaluation=EvalSettings(eval_text.shipped()[:400], "a text", 64, 64),
        )
        with server, pytest.MonkeyPatch.context() as patch:
            patch.setenv("COMPARATOR_ENDPOINTS", f"tiny={server.url}")
            get_settings.cache_clear()
            made = run(
                replace(request, reference=cells[reference]), engine=get_engine(), emit=lambda event: None
            )
            get_engine().unload()
        get_settings.cache_clear()
        assert made.cells[1].status == "ok", made.cells[1].error
        return made

    return compare


def exact_kl(toy, prompt_ids, answer, scale: float) -> np.ndarray:
    """KL(toy ‖ toy with its logits times `scale`) at each token of the answer, by numpy."""
    e, o = (m.astype(np.float64) for m in toy.matrices(tiny_models.VOCABULARY))
    logits = e[[prompt_ids[-1], *answer[:-1]]] @ o

    def log_softmax(x):
        return (
            x - x.max(-1, keepdims=True) - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
        )

    p, q = log_softmax(logits), log_softmax(scale * logits)
    return (np.exp(p) * (p - q)).sum(-1)


def test_the_likeliest_tokens_give_a_lower_bound(toy, compared, model):
    made = compared(scale=0.7)
    reference, server = made.cells
    prompt = server.fidelity.prompt
    assert prompt.token_ids == reference.token_ids and len(prompt.kl) == TOKENS
    assert (prompt.top_k, prompt.forced, prompt.at_least) == (20, True, True)
    ids = get_engine().encode(model, PROMPT, None, None).token_ids
    exact = exact_kl(toy, ids, reference.token_ids, 0.7)
    assert (np.array(prompt.kl) <= exact + 1e-6).all(), "no lower bound"
    assert (np.array(prompt.kl) > 0.3 * exact).all(), "so low a bound is of no use: were all 20 tokens named?"
    assert set(prompt.rank) == {0} and prompt.first_difference is None, "scaled logits have the same order"
    assert METRICS["prompt_kl_mean"].format(server).startswith("≥ ")
    assert not METRICS["prompt_kl_mean"].format(reference).startswith("≥")


def test_all_tokens_named_give_the_divergence_itself(toy, compared, monkeypatch, model):
    from comparator.runtimes.endpoint import runtime

    monkeypatch.setattr(runtime, "TOP", (tiny_models.VOCABULARY,))
    made = compared(scale=0.7, top=tiny_models.VOCABULARY)
    ids = get_engine().encode(model, PROMPT, None, None).token_ids
    exact = exact_kl(toy, ids, made.cells[0].token_ids, 0.7)
    assert made.cells[1].fidelity.prompt.kl == pytest.approx(exact, rel=1e-3)


def test_fewer_are_asked_for_where_more_are_refused(compared):
    prompt = compared(scale=0.7, top=5).cells[1].fidelity.prompt
    assert prompt.top_k in (5, 6) and len(prompt.kl) == TOKENS, "a server that gives 5 was not asked for 5"


def test_without_log_probabilities_only_agreement_is_known(compared):
    server = compared(top=0, gives_ids=True).cells[1]
    prompt = server.fidelity.prompt
    assert (prompt.kl, prompt.p, prompt.top_k) == ((), (), 0) and prompt.rank == (0,) * TOKENS
    assert METRICS["prompt_kl_mean"].format(server) == "–"
    assert METRICS["prompt_agreement"].get(server) == 1.0
    assert any("returns no log-probabilities" in note for note in server.notes), "– without the reason"


def test_a_server_that_cannot_be_forced_is_compared_up_to_the_first_difference(compared):
    """The toy's random tokens are no text: tokenized again they are others, which is where the two part."""
    made = compared(forms=("chat",))
    server = made.cells[1]
    prompt = server.fidelity.prompt
    first = prompt.first_difference
    assert not prompt.forced or first is None
    assert len(prompt.rank) == len(prompt.kl) == (TOKENS if first is None else first + 1)
    assert any("up to the first difference" in note for note in server.notes) == (not prompt.forced)
    if not prompt.forced:
        from comparator.fidelity import verdict

        said = verdict.words(server, made.cells[0])
        assert f"of {TOKENS}" in said and said.startswith("the same for"), "a class from a token or two"


@pytest.fixture(scope="module")
def outputs(toy, model, tmp_path_factory):
    """(what `run` printed, the folder with its outputs): the toy and a server."""
    from comparator.cli import app

    folder = tmp_path_factory.mktemp("endpoint")
    tokenizer, matrices = tiny_models.tokenizer(chat=True), toy.matrices(tiny_models.VOCABULARY)
    files = [part for end in ("json", "csv", "md", "html") for part in ("-o", str(folder / f"out.{end}"))]
    with (
        OpenAIServer(tokenizer, bigram(matrices, 0.7), owned_by="vllm") as server,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("COMPARATOR_ENDPOINTS", f"tiny={server.url}")
        get_settings.cache_clear()
        done = CliRunner().invoke(
            app,
            [
                "run",
                "-v",
                "toy",
                "-v",
                "endpoint@tiny",
                "--reference",
                "toy",
                "-m",
                model,
                "-p",
                PROMPT,
                "-n",
                "8",
                *files,
            ],
        )
        get_engine().unload()
    get_settings.cache_clear()
    assert done.exit_code == 0, done.output
    return done.output, folder, server.url


def test_the_document_holds_the_column_and_no_address(outputs):
    _, folder, url = outputs
    made = document.read(folder / "out.json")
    assert document.loads(document.dumps(made)) == made
    cell = made.cell("endpoint@tiny")
    assert cell.kernel == "vLLM" and cell.environment.device == "vLLM at endpoint@tiny"
    assert cell.latency.round_trip_s > 0 and cell.latency.ttft_s > 0 and cell.finish_reason == "length"
    memory = json.loads((folder / "out.json").read_text())["cells"][1]["memory"]
    assert set(memory.values()) == {None}, "memory of a server was not measured and is not null"
    for end in ("json", "csv", "md", "html"):
        assert url not in (folder / f"out.{end}").read_text(), f"the server's address stands in out.{end}"


def test_reports_show_a_lower_bound_as_one(outputs):
    output, folder, _ = outputs
    assert "≥ 0." in output and "≠" in output
    assert "≥ 0." in (folder / "out.md").read_text() and "≥ 0." in (folder / "out.html").read_text()
    _, row = csv.DictReader((folder / "out.csv").read_text().splitlines())
    assert (
        row["variant"] == "endpoint@tiny"
        and row["prompt_kl_mean_at_least"] == "yes"
        and row["resident_bytes"] == ""
    )
    assert float(row["prompt_kl_mean"]) > 0 and float(row["round_trip_s"]) > 0


def test_the_page_shows_it(outputs):
    from comparator.ui.form import Shown
    from comparator.ui.results import cards, summary
    from comparator.ui.tabs import fidelity, latency, layers, memory
    from comparator.ui.view_state import Live

    made = document.read(outputs[1] / "out.json")
    live, shown, cell = Live.of(made), Shown(made), made.cell("endpoint@tiny")
    card = cards.render(live, live.columns[1], 1)
    assert "Computed by vLLM" in card and "lower bound" in card
    assert "≥" in summary.render(live) and "different devices" in summary.render(live)
    assert "Round trip" in latency.figures_table(made)
    assert (
        "endpoint@tiny" in memory.figures_table(made) and layers.summary(cell) and layers.tensor_table(cell)
    )
    assert "≥" in fidelity.show(shown)[1], "the verdict shows a bound as the divergence"
    tokens = fidelity.view(shown, "endpoint@tiny")[0]
    assert "KL ≥" in tokens and "lower bound" in tokens


def test_it_is_no_reference_and_never_the_most_faithful(compared, toy, model):
    from comparator.fidelity import verdict
    from comparator.reporting.recommendation import recommend

    made = compared(scale=1.0)
    assert verdict.words(made.cells[1], made.cells[0]) != verdict.NO_DIFFERENCE, (
        "a bound of 0 shows no difference"
    )
    faithful = next(c for c in recommend(made.cells, made.cells[0]).choices if c.goal == "most faithful")
    assert faithful.cell is None and "lower bounds" in faithful.words


def test_a_server_as_the_reference_is_compared_by_its_words(toy, compared):
    itself, other = compared(reference=1, gives_ids=True).cells[::-1]
    for cell in (itself, other):
        prompt = cell.fidelity.prompt
        assert cell.fidelity.refused is None and prompt.kl == () and prompt.token_ids == itself.token_ids
        assert prompt.rank == (0,) * TOKENS and prompt.first_difference is None, (
            "the same model has the same answer"
        )
    assert any("the reference, gives no full logits" in note for note in other.notes), "– without the reason"


def test_a_text_is_not_scored_by_a_server_and_the_column_says_so(compared):
    toy, server = compared(fidelity="text").cells
    assert toy.fidelity.text["ppl"] > 0 and server.fidelity.text is None and server.fidelity.prompt.kl
    assert any("on the text are –" in note for note in server.notes)


def test_a_server_that_got_another_model_is_asked_anew(toy, model):
    from comparator.core.messages import LoadRequest

    tokenizer, matrices = tiny_models.tokenizer(chat=True), toy.matrices(tiny_models.VOCABULARY)
    engine, never = get_engine(), threading.Event()
    with OpenAIServer(tokenizer, bigram(matrices), models=("one",)) as server:
        ask = LoadRequest(model, resolve(f"endpoint@{server.url}"))
        first = engine.load(ask, never)
        assert engine.load(ask, never).handle == first.handle, "connected anew for nothing"
        server.models = ("two",)
        again = engine.load(ask, never)
        assert again.handle != first.handle and any("model two" in note for note in again.notes)
    engine.unload()
    with pytest.raises(UserError, match="cannot be reached"):
        engine.load(ask, never)
