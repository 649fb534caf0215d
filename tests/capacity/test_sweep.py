"""A sweep of a small model: each point's figures, what fails, Stop, and that a batch decodes what each sequence does alone."""

from __future__ import annotations

import json
import threading

import pytest

from comparator.backends import resolve
from comparator.capacity import points, sweep, sweep_words
from comparator.core.errors import Stopped, UserError
from comparator.core.messages import LoadRequest
from comparator.core.settings import Settings
from comparator.decoding.batch import TIE
from comparator.engine.local import LocalEngine

OPTIONS = points.Options(batches=(3, 1), contexts=(16,), new_tokens=6)


@pytest.fixture(scope="module")
def engine():
    made = LocalEngine(Settings())
    yield made
    made.unload()


def test_every_point_has_its_figures_or_its_reason(two_layers, engine) -> None:
    options = points.Options(batches=(3, 1), contexts=(16, 10**6), new_tokens=6)
    said: list[str] = []
    seen: list[int] = []
    made = sweep.run(
        engine, str(two_layers), [resolve("bf16"), resolve("nf4"), resolve("nf4@/no/such/folder")], options,
        on_progress=lambda fraction, message: said.append(message), on_point=lambda s: seen.append(len(s.points)),
    )  # fmt: skip
    assert seen == list(range(1, 13)) and not made.stopped
    measured = {(p.variant, p.batch): p for p in made.points if p.runs}
    assert sorted(measured) == [("bf16", 1), ("bf16", 3), ("nf4", 1), ("nf4", 3)]
    for (_, batch), point in measured.items():
        assert len(point.runs) == 3 and point.tok_s_each == pytest.approx(point.tok_s / batch)
        assert 0 < point.itl_p50_s <= point.itl_p99_s and point.ttft_s > 0 and point.path == "eager"
        assert point.peak_bytes > 10**7, "the peak leaves out what the variant holds"
    order = [(p.batch, p.variant) for p in made.points if p.runs]
    assert order == [(1, "bf16"), (1, "nf4"), (3, "bf16"), (3, "nf4")], (
        "resident variants are measured next to each other, so that the machine's load meets all of them"
    )
    reasons = [p.error for p in made.points if p.error]
    assert len(reasons) == 8 and sum("more than the model's context" in r for r in reasons) == 6
    assert any("bf16, batch 3, context 16 (" in m and "left)" in m for m in said), said
    assert json.loads(json.dumps(made.to_dict()))["points"][0]["decode_tok_s"] > 0
    header, rows = sweep_words.csv_rows(made)
    assert len(rows) == 12 and len(header) == len(rows[0])


def test_stop_keeps_what_was_measured(two_layers, engine) -> None:
    cancel = threading.Event()
    made = sweep.run(
        engine, str(two_layers), [resolve("bf16")], OPTIONS, cancel, on_point=lambda s: cancel.set()
    )
    assert made.stopped and [p.batch for p in made.points] == [1]
    assert "Stopped: 1 of 2 points were measured." in list(sweep_words.remarks(made))
    with pytest.raises(Stopped):
        sweep.run(engine, str(two_layers), [resolve("bf16")], OPTIONS, cancel)


@pytest.mark.parametrize(
    "options", [points.Options(batches=()), points.Options(batches=(5000,)), points.Options(repeats=0)]
)
def test_a_request_that_makes_no_sense_is_refused(two_layers, engine, options) -> None:
    with pytest.raises(UserError):
        sweep.run(engine, str(two_layers), [resolve("bf16")], options)


@pytest.mark.parametrize("variant", ["fp32", "bf16", "nf4"])
def test_a_batch_decodes_what_each_sequence_does_alone(two_layers, engine, variant: str) -> None:
    """Twice, since the cache is cut back between two runs; else the first token that differs is a near tie of rounding."""
    import torch

    from comparator.decoding.timed_batch import prefill

    cancel = threading.Event()
    handle = engine.load(LoadRequest(str(two_layers), resolve(variant)), cancel).handle
    with engine.column(handle) as column:
        prompts = points._prompts(column.vocabulary, 16, 0, range(3))
        batch = column.timed_batch(prompts, 6, cancel)
        tokens = batch.decode()[2]
        assert batch.decode()[2] == tokens, "a second run goes on from another cache than the first"
        for row, prompt in enumerate(prompts):
            ours = [step[row] for step in tokens]
            alone = [step[0] for step in column.timed_batch([prompt], 6, cancel).decode()[2]]
            if ours == alone:
                continue
            first = next(n for n, (a, b) in enumerate(zip(ours, alone, strict=True)) if a != b)
            with torch.inference_mode():
                whole = torch.tensor(
                    [[*p, *(step[n] for step in tokens[:first])] for n, p in enumerate(prompts)]
                )
                together, single = (
                    prefill(column.model, whole)[1][row],
                    prefill(column.model, whole[row : row + 1])[1][0],
                )
            best = single.topk(2).values
            assert float(best[0] - best[1]) <= TIE * float((together - single).std()), (
                f"row {row} decodes {ours} in a batch and {alone} alone: no rounding explains it"
            )
