"""A request → events, with real weights: order, failures that stay alone, Stop, the document."""

from __future__ import annotations

import statistics
import threading

import pytest

from comparator.backends import resolve
from comparator.comparison.runner import compare
from comparator.core.errors import UserError
from comparator.core.events import Done, Failed, Finished, Generated, Generating, Loading, Queued
from comparator.core.request import BUILTIN_MODEL, GenerationSettings, Request
from comparator.core.settings import Settings
from comparator.core.variant import Cell
from comparator.engine.local import LocalEngine


@pytest.fixture(scope="module")
def engine():
    engine = LocalEngine(Settings(max_new_tokens=64))
    yield engine
    engine.unload()


@pytest.fixture(scope="module")
def request_for(two_layers):
    """`request_for("bf16", "nf4", settings=…)`, of the model with two layers."""

    def make(*variants: str, prompt: str = "What is the capital of France?", **changes) -> Request:
        given = {
            "settings": GenerationSettings(max_new_tokens=8),
            "fidelity": "none",
            "model": str(two_layers),
        }
        return Request(cells=tuple(Cell(resolve(v)) for v in variants), prompt=prompt, **{**given, **changes})

    return make


def kinds(events, cell) -> list[str]:
    found: list[str] = []
    for event in events:
        if getattr(event, "cell", None) == cell and (not found or found[-1] != type(event).__name__):
            found.append(type(event).__name__)
    return found


def test_columns_run_in_order_and_end_in_a_document(engine, request_for):
    wanted = request_for("bf16", "nf4")
    events = list(compare(wanted, engine=engine))
    for cell in wanted.cells:
        assert kinds(events, cell) == ["Loading", "Generating", "Generated", "Finished"]
    document = events[-1].comparison
    assert document.ok and document.reference.variant == "bf16"
    assert document.prompt.chat and document.prompt.token_count > 10
    for cell in document.cells:
        assert len(cell.token_ids) == len(cell.latency.itl_s) + 1
        assert cell.latency.prefill_tok_s == pytest.approx(document.prompt.token_count / cell.latency.ttft_s)
        assert cell.memory.run_peak_bytes >= cell.memory.resident_bytes >= cell.memory.weight_bytes
        assert cell.memory.kv_cache_bytes > 0
        assert cell.layers and cell.kernel
    first = next(i for i, e in enumerate(events) if isinstance(e, Generating) and e.cell == wanted.cells[1])
    assert any(isinstance(e, Generated) and e.cell == wanted.cells[0] for e in events[:first]), (
        "two columns ran at once: they would disturb each other's latency"
    )


def test_repeats_alternate_and_report_medians(engine, request_for):
    wanted = request_for("bf16", "nf4", settings=GenerationSettings(max_new_tokens=4, repeats=3))
    events = list(compare(wanted, engine=engine))
    order = [(e.cell.variant.notation, e.round) for e in events if isinstance(e, Generating)]
    assert list(dict.fromkeys(order)) == [(v, r) for r in range(3) for v in ("bf16", "nf4")]
    for cell in events[-1].comparison.cells:
        runs = [r for r in cell.latency.runs if not r.disturbed] or cell.latency.runs
        assert len(cell.latency.runs) == 3
        assert cell.latency.decode_tok_s == statistics.median(r.decode_tok_s for r in runs)


def test_one_columns_failure_is_its_own(engine, tmp_path, request_for):
    wanted = request_for("bf16", "nf4:skip=q_proj+k_proj+v_proj+o_proj+gate_proj+up_proj+down_proj+lm_head")
    events = list(compare(wanted, engine=engine))
    failed = [e for e in events if isinstance(e, Failed)]
    assert len(failed) == 1 and failed[0].advice
    document = events[-1].comparison
    assert [c.status for c in document.cells] == ["ok", "failed"]
    assert document.cells[1].error.problem == failed[0].problem


@pytest.mark.parametrize(
    "change, names",
    [
        (dict(prompt="   "), "empty"),
        (dict(settings=GenerationSettings(max_new_tokens=0)), "max_new_tokens"),
        (dict(settings=GenerationSettings(max_new_tokens=65)), "max_new_tokens"),
        (dict(settings=GenerationSettings(top_p=0)), "top_p"),
        (dict(settings=GenerationSettings(temperature=-1)), "temperature"),
        (dict(settings=GenerationSettings(temperature=float("nan"))), "temperature"),
        (dict(settings=GenerationSettings(decode="fast")), "decode"),
        (dict(max_memory="0=lots"), "lots"),
    ],
)
def test_wrong_requests_are_refused_at_once(engine, change, names, request_for):
    with pytest.raises(UserError, match=names) as refused:
        compare(request_for("bf16", **change), engine=engine)
    assert refused.value.advice


def test_too_many_twice_and_none(engine, request_for):
    for variants, names in (
        (["bf16"] * 2, "twice"),
        ([], "No variant"),
        ([f"int8:threshold={i}" for i in range(9)], "9 columns"),
    ):
        with pytest.raises(UserError, match=names):
            compare(request_for(*variants), engine=engine)


def test_a_prompt_longer_than_the_context_is_refused_with_figures(request_for):
    roomy = LocalEngine(Settings(max_prompt_tokens=100_000))
    with pytest.raises(UserError, match="8,192"):
        list(compare(request_for("bf16", prompt="word " * 9000), engine=roomy))


def test_an_unknown_model_is_a_problem(engine):
    with pytest.raises(UserError):
        list(compare(Request("no-such-model", (Cell(resolve("bf16")),), "Hi"), engine=engine))
    assert not engine.queue.busy, "a refused request must leave the line"


def test_stop_keeps_what_was_finished(engine, request_for):
    cancel = threading.Event()
    wanted = request_for(
        "bf16", "nf4", "int8", prompt="Tell me a story.", settings=GenerationSettings(max_new_tokens=40)
    )
    seen = 0
    for event in compare(wanted, engine=engine, cancel=cancel):
        if isinstance(event, Generating) and event.cell == wanted.cells[1]:
            seen += 1
            if seen == 3:
                cancel.set()
    document = event.comparison
    assert [c.status for c in document.cells] == ["ok", "stopped", "stopped"]
    assert document.cells[1].text and not document.cells[2].text
    assert document.cells[2].latency.ttft_s is None, "what was not measured is None, never 0"


def test_closing_the_iterator_lets_the_next_in(engine, request_for):
    events = compare(request_for("bf16", settings=GenerationSettings(max_new_tokens=60)), engine=engine)
    for event in events:
        if isinstance(event, Generating):
            break
    events.close()
    assert not engine.queue.busy
    assert isinstance(list(compare(request_for("bf16"), engine=engine))[-1], Done)


def test_two_at_once_are_served_in_order(engine, request_for):
    results: dict[str, list] = {}

    def visit(name: str) -> None:
        results[name] = list(compare(request_for("bf16", prompt=f"Say {name}."), engine=engine))

    first = compare(request_for("bf16", settings=GenerationSettings(max_new_tokens=30)), engine=engine)
    next(first)
    others = [threading.Thread(target=visit, args=(n,)) for n in ("one", "two")]
    for thread in others:
        thread.start()
    list(first)
    for thread in others:
        thread.join(120)
    for name in ("one", "two"):
        on_progress = [e.doing for e in results[name] if isinstance(e, Queued)]
        assert on_progress and all("a comparison is" in t for t in on_progress), (
            "a visitor who waits must be told for whom"
        )
        assert any("variant 1 of 1" in t for t in on_progress) and not any("Say" in t for t in on_progress), (
            on_progress
        )
        assert results[name][-1].comparison.prompt.text == f"Say {name}."
        assert results[name][-1].comparison.ok


def test_raw_text_and_system_prompt(builtin, engine, request_for):
    asked = request_for("bf16", chat=False, prompt="The capital of France is", model=BUILTIN_MODEL)
    raw = list(compare(asked, engine=engine))[-1].comparison
    assert not raw.prompt.chat and "Paris" in raw.cells[0].text
    said = list(compare(request_for("bf16", system="Answer in one word."), engine=engine))[-1].comparison
    assert said.prompt.token_count != raw.prompt.token_count and said.prompt.system


def test_loading_is_told(engine, request_for):
    engine.unload()
    events = list(compare(request_for("nf4"), engine=engine))
    assert any(isinstance(e, Loading) and e.fraction and 0 < e.fraction < 1 for e in events), (
        "no progress of loading"
    )
    assert isinstance(events[-2], Finished)
