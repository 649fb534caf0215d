"""The form → a request, and the stop signals of the runs under way."""

from __future__ import annotations

import time

import pytest

from comparator.core.errors import UserError
from comparator.core.request import ChatTemplate, parse_variables
from comparator.ui.form import Form, Runs, Shown

PICKED = {"on": ["bf16", "nf4"], "reference": "auto"}
GOOD = {"model": "smollm2-135m", "picked": PICKED, "prompt": "Hi"}


def test_a_first_visit_makes_a_request():
    request = Form(**GOOD).request(8)
    assert [c.label for c in request.cells] == ["bf16", "nf4"]
    assert request.reference is None and request.chat is None and request.system is None
    assert request.settings.max_new_tokens == 64


def test_the_chosen_reference_and_switches_are_kept():
    form = Form(
        **GOOD | {"picked": PICKED | {"reference": "nf4"}}, chat="off", system="  Be brief. ", temperature=0.5
    )
    request = form.request(8)
    assert request.reference.label == "nf4"
    assert request.chat is False and request.system == "Be brief." and request.settings.temperature == 0.5


def test_template_variables_are_a_line_each():
    form = Form(**GOOD, template_vars="enable_thinking=false\n\neffort = high\n", template=" rag ")
    assert form.request(8).template == ChatTemplate("rag", {"enable_thinking": False, "effort": "high"})
    with pytest.raises(UserError, match="not a template variable"):
        Form(**GOOD, template_vars="no thinking").request(8)


def test_a_reference_that_is_not_ticked_is_left_to_the_engine():
    assert Form(**GOOD | {"picked": PICKED | {"reference": "fp32"}}).request(8).reference is None


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": "  "}, "prompt is empty"),
        ({"prompt": None}, "prompt is empty"),
        ({"model": ""}, "No model"),
        ({"picked": {"on": []}}, "No variant"),
        ({"picked": None}, "No variant"),
        ({"picked": {"on": ["nf5"]}}, "no method"),
        ({"picked": {"on": ["bf16", "fp16", "fp32"]}}, "3 columns"),
        ({"max_new_tokens": None}, "New tokens"),
        ({"max_new_tokens": 1.5}, "whole number"),
        ({"seed": float("inf")}, "Seed"),
        ({"temperature": "warm"}, "Temperature"),
        ({"temperature": float("nan")}, "Temperature"),
    ],
)
def test_what_is_wrong_is_named(change, said):
    with pytest.raises(UserError) as refused:
        Form(**GOOD | change).request(2)
    assert said in refused.value.problem
    assert refused.value.advice, "a problem comes with a way out"


def test_stop_reaches_only_ones_own_run():
    runs = Runs()
    mine, theirs = runs.begin("me"), runs.begin("them")
    assert runs.stop("me") and mine.is_set() and not theirs.is_set()
    assert not runs.stop("nobody")


def test_a_second_run_of_the_same_visitor_ends_the_first():
    runs = Runs()
    first = runs.begin("me")
    second = runs.begin("me")
    assert first.is_set() and not second.is_set()
    runs.end("me", first)
    assert runs.stop("me"), "the end of the first run must not forget the second"


def test_shown_is_one_object():
    """Gradio hashes and copies what it keeps; a comparison of thousands of rows must not be walked through."""
    import copy

    shown = Shown()
    assert copy.deepcopy(shown) is shown and shown != Shown() and hash(shown) == hash(shown)


@pytest.mark.parametrize(
    "hostile",
    [
        {"picked": {"on": ["nf4:skip=" + "a+" * 900_000]}},
        {"picked": {"on": [f"nf4:skip=a{n}" for n in range(100_000)]}},
        {"picked": {"on": ["n" * 1_900_000]}},
        {"adapters": ["u/" + "x" * 1_900_000]},
        {"columns": ["x"] * 600_000, "known_columns": ["y"] * 600_000},
        {"template_vars": "a=" + "[" * 1_000_000, "prompt": ""},
        {"calibration": "word " * 1_000_000},
    ],
    ids=lambda given: "+".join(given),
)
def test_a_form_of_two_megabytes_is_refused_at_once_and_leaves_nothing(hostile, own_dirs):
    began = time.process_time()
    with pytest.raises(UserError) as refused:
        Form(**GOOD | hostile).request(8)
    assert time.process_time() - began < 2, "judging a form takes as long as its sender likes"
    assert len(str(refused.value)) < 1_000, "the refusal quotes all that was sent"
    assert not list(own_dirs.rglob("*.json"))


def test_a_variable_of_deep_brackets_is_text():
    assert parse_variables(["a=" + "[" * 100_000])["a"].startswith("[[")


def test_a_pasted_calibration_is_kept_only_once_the_request_is_admitted(own_dirs):
    form = Form(
        **GOOD | {"picked": {"on": ["gptq:4bit"]}}, calibration="Some words of a calibration text. " * 200
    )

    def refuse(request):
        raise UserError("You have started 6 comparisons in the last minute.")

    with pytest.raises(UserError, match="6 comparisons"):
        form.request(8, refuse)
    assert not list(own_dirs.rglob("*.json")), "a refused request fills the disk"
    assert "cal=" in form.request(8).cells[0].label
