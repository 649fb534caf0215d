"""One run of one column. The recorded step is called on a CPU here instead of replayed on a GPU: all but the capture."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import tiny_models

from comparator.backends import resolve
from comparator.core.messages import Prompt
from comparator.core.request import GenerationSettings
from comparator.core.result import CellResult, Latency
from comparator.core.settings import Settings
from comparator.engine.pool import Pool
from comparator.metrics import definitions
from comparator.runtimes.transformers import run as engine_run
from comparator.sources import open_checkpoint

PROMPT = Prompt((5, 6, 7, 8, 9), chat=False)
ASKED = GenerationSettings(max_new_tokens=12)


@pytest.fixture(scope="module")
def slot(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tiny_models.save(folder, "llama", eos_token_id=None)
    pool = Pool(Settings())
    checkpoint = open_checkpoint(str(folder), settings=Settings())
    yield pool.load(checkpoint, resolve("fp32"), None, True, set(), lambda *_: None, threading.Event())[0]
    pool.unload()


@pytest.fixture
def recorded(slot, monkeypatch):
    """The slot's decoder plans a recorded step, whatever is asked for."""
    from comparator.decoding.planner import Plan, record
    from comparator.decoding.static_state import StaticDecodeState, bucket

    fixed = StaticDecodeState(slot.model, bucket(len(PROMPT.token_ids) + ASKED.max_new_tokens))
    made, notes, _ = record(slot.model, fixed, list(PROMPT.token_ids), False, True)
    monkeypatch.setattr(type(slot.decoder), "plan", lambda *_: Plan(made.path, made, 0.1, notes))


def run(slot, decode: str, cancel=None):
    emitted = []
    settings = replace(ASKED, decode=decode)
    result = engine_run.run_once(slot, PROMPT, settings, cancel or threading.Event(), emitted.append)
    return result, [token for token, _ in emitted]


def test_both_measures_the_eager_path_too_and_shows_one_answer(slot, recorded):
    result, shown = run(slot, "both")
    assert result.decode_path == "cuda-graph" and len(shown) == 12
    assert list(result.token_ids) == shown, "the eager run's tokens must not reach the answer"
    assert result.latency.eager_decode_tok_s > 0
    assert len(result.latency.itl_s) == 11, "the column's own figures are those of its own path"
    cell = CellResult("fp32", latency=result.latency)
    ours, eager = result.latency.decode_tok_s, result.latency.eager_decode_tok_s
    assert definitions.python_overhead_s(cell) == pytest.approx(1 / eager - 1 / ours)


def test_eager_is_measured_only_where_it_is_asked_for_and_another_path(slot, recorded):
    assert run(slot, "auto")[0].latency.eager_decode_tok_s is None


def test_a_column_that_decodes_eagerly_anyway_is_not_run_twice(slot):
    result, shown = run(slot, "both")
    assert result.decode_path == "eager" and result.latency.eager_decode_tok_s is None
    assert len(shown) == 12 and not result.notes, "on a CPU there is nothing to explain"


def test_stop_during_the_eager_run_keeps_what_was_measured(slot, recorded, monkeypatch):
    cancel, before = threading.Event(), engine_run._eager_too

    def stopping(*args):
        cancel.set()
        return before(*args)

    monkeypatch.setattr(engine_run, "_eager_too", stopping)
    result, shown = run(slot, "both", cancel)
    assert result.finish_reason == "length" and len(shown) == 12
    assert result.latency.decode_tok_s > 0 and result.latency.eager_decode_tok_s is None


def test_memory_is_flat_over_100_runs(slot):
    from comparator.metrics import memory

    def held() -> int:
        memory.give_back()
        if slot.device.startswith("cuda"):
            import torch

            return torch.cuda.memory_allocated(slot.device)
        return memory.resident_set()

    for _ in range(20):  # what libraries set up in the first runs
        run(slot, "auto")
    after_20 = held()
    for _ in range(80):
        run(slot, "auto")
    grown = held() - after_20
    assert grown < 8e6, (
        f"80 more runs left {grown / 1e6:.1f} MB behind: does a run keep its cache or its logits?"
    )


def test_a_figure_above_the_floor_is_called_no_result(slot, monkeypatch):
    assert run(slot, "auto")[0].latency.floor_tok_s is None, "a CPU has no floor"
    monkeypatch.setattr(engine_run, "_floor_tok_s", lambda *_: 1e-3)
    result, _ = run(slot, "auto")
    assert any("above the roofline" in note and "Not a result" in note for note in result.notes)
    monkeypatch.setattr(engine_run, "_floor_tok_s", lambda *_: 1e9)
    result, _ = run(slot, "auto")
    assert not result.notes and 0 < definitions.mbu(CellResult("fp32", latency=result.latency)) < 1


def test_the_latency_tab_shows_both_truths_where_they_were_measured(slot):
    import sample

    from comparator.ui.tabs import latency

    plain = sample.comparison()
    assert "MBU" not in latency.figures_table(plain), "no empty columns where there is no GPU"
    measured = Latency(decode_tok_s=100.0, eager_decode_tok_s=20.0, floor_tok_s=400.0)
    cells = (replace(plain.cells[0], latency=measured), *plain.cells[1:])
    table = latency.figures_table(replace(plain, cells=cells))
    for head, value in (("MBU, % ↑", "25"), ("Eager decode, tok/s ↑", "20"), ("Python overhead, ms", "40")):
        assert head in table and f">{value}" in table, (head, table)
