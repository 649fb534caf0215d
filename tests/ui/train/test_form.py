"""The Train tab without a browser: fields → a request, what is shown as HTML, and what a page is sent."""

from __future__ import annotations

from dataclasses import replace

import gradio as gr
import pytest

from comparator.core.errors import UserError
from comparator.core.result import ErrorInfo
from comparator.training.settings import SETTINGS, TrainSettings
from comparator.training.types import (
    DataSource,
    Estimate,
    EvalRow,
    Evaluation,
    LossPoint,
    Piece,
    Sample,
    SamplePreview,
    TrainingResult,
    TrainingState,
    TrainRequest,
)
from comparator.ui.panel import variants
from comparator.ui.train import evaluation, preview, progress, status, trained, trained_view
from comparator.ui.train import run as train_run
from comparator.ui.train.form import FIRST, TrainForm, Uploaded

GOOD = {"model": "smollm2-135m", "base": "nf4:dq", "data": "pirate"}
EVIL = "<img src=x onerror=alert(1)>"
RESULT = TrainingResult(
    "sailor", "sailor", "/x", "nf4:dq", "smollm2-135m", False, 6, 6, 4.0, 3.0, 4.1, 3.2, 20.0, 130.0, None, 10, 10, "pirate",
    "f" * 64, 29, 3, "2026-01-31T12:00:00+00:00",
)  # fmt: skip
STATE = TrainingState(
    "sailor", TrainRequest(DataSource("pirate")), "training", step=3, of=6, eta_s=200.0, version=4
)


def form(**changes) -> TrainForm:
    return TrainForm(**GOOD | changes)


def test_a_first_visit_asks_for_the_defaults():
    fields = {s.name: list(s.default) if s.kind == "names" else s.default for s in SETTINGS}
    request = form(settings=fields | {"gradient_checkpointing": "auto"}, prompt=" Hi ", name=" ").request()
    assert request == TrainRequest(DataSource("pirate"), base="nf4:dq", sample_prompt="Hi")
    assert request.settings == TrainSettings()
    assert set(FIRST) < set(fields), "a setting that is shown first is not known any more"


def test_every_kind_of_field_is_read():
    given = {
        "rank": 8.0, "learning_rate": "1e-3", "dora": True, "scheduler": "cosine", "gradient_checkpointing": "off",
        "target_modules": ["all-linear", "q_proj", " v_proj", "q_proj"],
    }  # fmt: skip
    made = form(settings=given).train_settings()
    assert (made.rank, type(made.rank), made.learning_rate) == (8, int, 1e-3)
    assert made.dora is True and made.scheduler == "cosine" and made.gradient_checkpointing is False
    assert made.target_modules == ("q_proj", "v_proj"), "names of layers replace “all”"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": "  "}, "No data"),
        ({"model": None}, "No model"),
        ({"base": ""}, "No base"),
        ({"base": "nf5"}, "no method"),
        ({"settings": {"rank": 0}}, "Rank.*1 and 1,024"),
        ({"settings": {"rank": None}}, "Rank.*not a number"),
        ({"settings": {"rank": True}}, "Rank.*not a number"),
        ({"settings": {"rank": 1.5}}, "whole number"),
        ({"settings": {"learning_rate": float("nan")}}, "Learning rate"),
        ({"settings": {"max_length": 1e300}}, "Max length"),
        ({"settings": {"scheduler": EVIL}}, "Scheduler"),
        ({"settings": {"target_modules": []}}, "Target modules is empty"),
    ],
)
def test_what_is_wrong_is_named_with_a_way_out(changes, said):
    with pytest.raises(UserError, match=f"(?s){said}") as refused:
        form(**changes).request()
    assert refused.value.advice


def test_a_file_is_the_uploaded_one_as_long_as_its_name_stands_there():
    file = Uploaded("/somewhere/mine.csv", "mine.csv")
    assert form(data="mine.csv", uploaded=file).source() == DataSource(
        "/somewhere/mine.csv", name="mine.csv", uploaded=True
    )
    assert form(data="pirate", uploaded=file).source() == DataSource("pirate")
    named = form(form="prompt", columns={"prompt": "q", "completion": " a ", "text": "t"}).source()
    assert named.columns == (("prompt", "q"), ("completion", "a")), "columns of other forms do not count"


# ---------------------------------------------------------------- as HTML


def test_what_is_masked_is_told_by_a_word_and_nothing_is_markup():
    html = preview.sample(
        SamplePreview(7, (Piece(f"{EVIL}?", False, 5), Piece("Arr <b>", True, 2)), 9, 2, cut_tokens=3)
    )
    assert "<img" not in html and "<b>x" not in html and "Arr &lt;b&gt;" in html
    assert (
        "masked:" in html
        and html.index("masked:") < html.index(">trained on:")
        and "3 tokens truncated" in html
    )


def test_an_estimate_that_does_not_fit_says_so_with_its_figures():
    found = Estimate(24, 4_884_480, 134_515_008, 168_000_000, 19_500_000, 19_500_000, 180_000_000, 387_000_000,
                     100_000_000, "cpu", "adamw_torch", False, ("q_proj",))  # fmt: skip
    html = preview.estimate(found, "nf4:dq")
    assert "4.88 M trainable" in html and "24 steps" in html and "387 MB" in html and "3.5 %" in html
    assert 'role="alert"' not in html
    wrong = preview.estimate(
        replace(found, problem=ErrorInfo("It needs 387 MB.", "Lower the rank.")), "nf4:dq"
    )
    assert 'role="alert"' in wrong and "Lower the rank." in wrong


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "Step 3 of 6, 3 min 20 s left"),
        ({"status": "waiting", "message": "a comparison is running"}, "Queued: a comparison is running"),
        ({"stopping": True}, "kept"),
        ({"status": "finished", "step": 6, "elapsed_s": 42.4}, "6 steps in 42 s"),
        ({"status": "stopped"}, "after step 3 of 6"),
        ({"status": "cancelled"}, "nothing was saved"),
        ({"status": "interrupted", "checkpoint_step": 2}, "checkpoint at step 2"),
        ({"status": "failed", "error": ErrorInfo("The loss is NaN.", "Lower the rate."), "checkpoint_step": 2},
         "The loss is NaN.*Lower the rate.*checkpoint at step 2"),
    ],
)  # fmt: skip
def test_a_run_says_how_it_stands(changes, said):
    import re

    state = replace(STATE, **changes)
    html = progress.render(state)
    assert re.search(f"(?s){said}", html), html
    assert bool(status.banner(state)) is not state.over, (
        "the line above is there while it runs, and only then"
    )


def test_answers_are_text():
    state = replace(
        STATE, samples=(Sample("sailor", 0, EVIL, EVIL, EVIL), Sample("sailor", 2, EVIL, EVIL, ""))
    )
    html = progress.samples(state) + progress.render(replace(state, job=EVIL)) + status.banner(state)
    assert "<img" not in html and "after step 2" in html and "empty answer" in html


def test_the_evaluation_pairs_rows_and_tells_what_failed():
    rows = (
        EvalRow("bf16", None, 4.0, 54.6, 77, 3),
        EvalRow("bf16", "sailor", 3.0, 20.1, 77, 3),
        EvalRow("nf4", None, 4.5, 90.0, 77, 3),
        EvalRow("nf4", "sailor", None, None, problem=ErrorInfo("Too <b>large.", "Free some memory.")),
    )
    html = trained_view.evaluation_table(Evaluation("2026-01-31T12:00:00+00:00", "nf4", rows))
    assert "×0.37 better" in html and "trained on" in html and "3 samples" in html
    assert "nf4 + sailor" in html and "Too &lt;b&gt;large." in html and "Free some memory." in html


# ---------------------------------------------------------------- what a page is sent


def test_only_what_changed_is_sent():
    def sent(state, watched):
        found = train_run.values(state, watched)
        assert len(found) == train_run.SKIPPED
        return [
            value for value in found if not (isinstance(value, dict) and value.get("__type__") == "update")
        ]

    state = replace(STATE, curve=(LossPoint(1, 4.0),))
    seen = train_run.Watched.of(state)
    assert not sent(state, seen), "nothing is new, and something was sent all the same"
    later = replace(state, version=5, tok_s=120.0)
    assert not any("Figure" in type(v).__name__ for v in sent(later, seen)), "the plot is sent for every tick"
    assert any("Figure" in type(v).__name__ for v in sent(later, train_run.Watched())), (
        "a new page gets no plot"
    )
    buttons = train_run.values(replace(later, status="finished"), seen)[6:10]
    assert [b.interactive for b in buttons[:2]] == [True, False]


def test_compare_now_ticks_the_base_and_makes_room():
    picked = variants.picked(8)
    value, left = trained._with_base(picked, RESULT, 8)
    assert value["on"] == ["bf16", "int8", "nf4", "nf4:dq"] and not left
    value, left = trained._with_base(picked, RESULT, 4)
    assert value["on"] == ["bf16", "nf4:dq"] and left == ["int8", "nf4"], (
        "two columns a variant, four at most"
    )
    boxes, laid = evaluation.boxes_of(None, None, picked, None)
    assert isinstance(boxes, gr.CheckboxGroup) and boxes.value == laid[1]
    again, same = evaluation.boxes_of(None, None, picked, laid)
    assert not isinstance(again, gr.CheckboxGroup), "what a visitor has ticked since is thrown away"
    assert same == laid
    other, _ = evaluation.boxes_of(None, None, {**picked, "on": picked["on"][:1]}, laid)
    assert isinstance(other, gr.CheckboxGroup), "the list on the left has other ticks now"
