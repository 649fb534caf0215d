"""The Fidelity tab and its pictures: pure functions of a comparison, whatever is in the document."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest
import sample

from comparator.backends import resolve
from comparator.core.request import Request
from comparator.core.result import Fidelity, PromptFidelity, TopToken
from comparator.core.variant import Cell
from comparator.fidelity import verdict
from comparator.reporting.plots import fidelity as plots_fidelity

pytest.importorskip("gradio")

from comparator.ui.form import Shown
from comparator.ui.results import fidelity_tables, token_view
from comparator.ui.tabs import fidelity
from comparator.util import formatting


def scored(cell=sample.NF4, **text):
    """A column with figures on a longer text; `floor__kl={…}` for nested ones is not needed: dicts are given whole."""
    return replace(cell, fidelity=replace(cell.fidelity, text={**cell.fidelity.text, **text}))


def only(*cells):
    return sample.comparison(cells=(sample.REFERENCE, *cells))


def of(comparison, label):
    return next(v for v in verdict.verdicts(comparison) if v.cell.label == label)


# ---------------------------------------------------------------- the verdict


def test_a_divergence_within_its_own_floor_is_rounding():
    kl = {"mean": 0.0010, "se": 0.00002}
    below = of(only(scored(kl=kl, floor={"kl": {"mean": 0.0014, "se": 0.00002}})), "nf4")
    assert below.below_floor and below.words == "no difference but rounding"
    within = of(
        only(scored(kl={"mean": 0.0101, "se": 0.0002}, floor={"kl": {"mean": 0.0098, "se": 0.0002}})), "nf4"
    )
    assert within.below_floor, "0.0003 apart with a common error of 0.00028 is not more than twice that"
    above = of(only(scored(kl={"mean": 0.3, "se": 0.01}, floor={"kl": {"mean": 0.0, "se": 0.0}})), "nf4")
    assert above.below_floor is False


@pytest.mark.parametrize(
    ("mean", "se", "words"),
    [
        (0.995, 0.001, "nearly the same"),
        (0.93, 0.005, "close"),
        (0.80, 0.01, "different"),
        (0.60, 0.01, "very different"),
        (0.895, 0.005, "probably different (89.5 ± 0.5 % agree)"),
        (0.905, 0.005, "probably close (90.5 ± 0.5 % agree)"),
        (0.97, 0.03, "probably close (97.0 ± 3.0 % agree)"),
    ],
)
def test_agreement_in_words(mean, se, words):
    one = of(only(scored(top1={"mean": mean, "se": se}, kl={"mean": 1.0, "se": 0.01})), "nf4")
    assert one.words == words


def test_the_reference_has_no_divergence_and_the_rule_is_on_the_page():
    comparison = only(scored(), replace(sample.ADAPTED))
    reference, nf4, adapted = verdict.verdicts(comparison)
    assert reference.is_reference and reference.kl is None and reference.words == "reference"
    assert (nf4.ppl_ratio is None) == ("ppl_ratio" not in sample.TEXT_FIDELITY), "a ratio may not be made up"
    assert adapted.words == "not measured"
    html = fidelity_tables.verdict_table(comparison)
    assert "The rule." in html and "noise floor" in html
    assert "The reference column with this adapter failed." in fidelity_tables.refusals(comparison)


def test_no_difference_where_it_is_within_the_error():
    unsure = fidelity_tables.verdict_table(only(scored(ppl_ratio=1.01, ppl_ratio_se=0.02)))
    sure = fidelity_tables.verdict_table(only(scored(ppl_ratio=1.21, ppl_ratio_se=0.02)))
    row = re.compile(r"×1\.\d\d</span> <span class=\"soft\">no difference")
    assert row.search(unsure) and not row.search(sure)


# ---------------------------------------------------------------- pictures


def test_the_pareto_front():
    points = [(100, 0.3), (200, 0.1), (300, 0.2), (150, 0.4), (400, 0.0), (100, 0.5)]
    assert plots_fidelity.pareto(points) == [(100, 0.3), (200, 0.1), (400, 0.0)]
    assert plots_fidelity.pareto([]) == []


def test_memory_against_divergence():
    comparison = only(scored())
    figure = plots_fidelity.trade_off(comparison)
    named = {t.name: t for t in figure.data if t.mode == "markers" and t.marker.symbol != "line-ew"}
    assert set(named) == {"bf16", "nf4"} == {a.text for a in figure.layout.annotations}
    assert named["nf4"].x == ((sample.NF4.memory.weight_bytes + sample.NF4.memory.quant_state_bytes) / 1e6,)
    assert named["nf4"].y == (0.321,)
    assert named["bf16"].marker.size > named["nf4"].marker.size, "bf16 decodes faster, so its dot is larger"
    assert figure.layout.yaxis.type == "log"
    in_bits = plots_fidelity.trade_off(comparison, bits=True).layout.xaxis.title.text
    assert in_bits == "← better: bits per weight, with quant state"


def test_lines_by_token_leave_the_reference_out_and_mark_the_first_difference():
    figure = plots_fidelity.kl_by_token(only(scored()))
    line, mark = figure.data
    assert (line.name, tuple(line.y)) == ("nf4", sample.PROMPT_FIDELITY.kl)
    assert (tuple(mark.x), tuple(mark.y)) == ((2,), (0.31,))


def test_the_heat_map_is_layers_by_modules():
    names = {f"model.layers.{n}.mlp.{m}.weight": n + len(m) / 100 for n in (0, 1, 10) for m in ("up", "down")}
    modules, layers, values = plots_fidelity.grid(names | {"lm_head.weight": 1.0})
    assert (modules, layers) == (["mlp.up", "mlp.down"], ["0", "1", "10"])
    assert values[2] == [10.02, 10.04]
    figure = plots_fidelity.layer_map(sample.NF4)
    drawn = figure.data[0]
    assert [list(row) for row in drawn.customdata] == [[0.0913]], "hovering shows the error itself"
    assert [list(row) for row in drawn.z] == [[pytest.approx(math.log10(0.0913))]]
    assert drawn.zmin == drawn.z[0][0], (
        "the scale is this column's own: from 0 on, 4-bit columns are of one colour"
    )


# ---------------------------------------------------------------- tokens


def test_tokens_are_coloured_and_say_both_top_fives():
    html = token_view.coloured(sample.NF4, sample.PROMPT_FIDELITY)
    assert '<span class="tok k0"' in html and '<span class="tok k3 first"' in html
    hover = token_view.hover(sample.PROMPT_FIDELITY, 1)
    assert (
        "first difference" in hover
        and "most likely: “ city” 50.0 %" in hover
        and "in the reference: “ capital” 70.0 %" in hover
    )
    assert [token_view.level(v) for v in (0, 0.0099, 0.01, 0.3, 5)] == [0, 0, 1, 3, 5]


def test_markup_in_a_token_is_text():
    evil = "<img src=x onerror=alert(1)>"
    prompt = replace(
        sample.PROMPT_FIDELITY,
        tokens=(evil, '"', "'"),
        top=((TopToken(evil, 0.5),), (), ()),
        reference_top=(),
    )
    cell = replace(sample.NF4, fidelity=Fidelity(prompt, refused=evil))
    comparison = only(cell)
    html = "".join(
        (token_view.coloured(cell, prompt), token_view.token_table(prompt), fidelity_tables.refusals(comparison),
         fidelity.explained(comparison), fidelity_tables.verdict_table(comparison), fidelity_tables.text_table(comparison))
    )  # fmt: skip
    assert "<img" not in html
    drawn = str(plots_fidelity.kl_by_token(comparison).to_dict())
    assert "<img" not in drawn


@pytest.mark.parametrize(
    "text",
    [
        {},
        {"kl": "high", "ppl": [1], "top1": None, "floor": 3, "tokens": "many", "name": {"a": 1}},
        {"kl": {"mean": "0"}, "tokens": 5, "context": "x"},
    ],
)
def test_a_document_from_elsewhere_may_say_anything(text):
    prompt = PromptFidelity(token_ids=(1, 2), tokens=("a", "b"), kl=(0.5,), first_difference=7)
    cell = replace(sample.NF4, fidelity=Fidelity(prompt, text))
    comparison = only(cell, replace(sample.NF4, variant="fp4", fidelity=Fidelity(PromptFidelity(), text)))
    shown = fidelity.show(Shown(comparison))
    assert len(shown) == 10 and "verdict" in shown[1]
    tokens, _, _ = fidelity.view(Shown(comparison), "nf4")
    assert "tok k4" in tokens
    assert fidelity.view(Shown(comparison), "no such column")[0] == ""


def test_without_figures_the_tab_says_what_to_do():
    plain = replace(sample.NF4, fidelity=None)
    assert "under Fidelity" in fidelity.show(Shown(only(plain)))[0]
    assert "second one" in fidelity.show(Shown(sample.comparison(cells=(sample.REFERENCE,))))[0]
    assert len(fidelity.show(Shown())) == 10


@pytest.mark.parametrize(
    ("value", "written"),
    [(None, "–"), (0, "0"), (1.6e-5, "1.6e-05"), (0.000987, "0.000987"), (0.01851, "0.0185"), (0.449, "0.449"),
     (3.2101, "3.21"), (10.494, "10.5")],
)  # fmt: skip
def test_small_figures(value, written):
    assert formatting.small(value) == written


def test_the_form_asks_for_it():
    from comparator.core.errors import UserError
    from comparator.ui.form import Form

    form = Form(
        model="smollm2-135m", picked={"on": ["bf16", "nf4"]}, prompt="Hi", fidelity="text", eval_text=" mine "
    )
    request = form.request(8)
    assert request.fidelity == "text" and request.evaluation.text == " mine "
    assert Form(model="m", picked={"on": ["bf16"]}, prompt="Hi").request(8).evaluation.text is None
    with pytest.raises(UserError, match="Context"):
        replace(form, context="many").request(8)


# ---------------------------------------------------------------- while a comparison runs


def test_the_tab_says_what_has_to_happen_and_fills_as_columns_are_scored():
    cells = (Cell(resolve("bf16")), Cell(resolve("nf4")))
    request = Request("model", cells, "A prompt")
    intro, verdicts, *_ = fidelity.show(Shown(running=request))
    assert "0 of 2 variants have answered" in intro and not verdicts, "an earlier run's figures are gone"
    answered = sample.comparison(cells=(sample.REFERENCE, replace(sample.NF4, fidelity=None)))
    assert "2 of 2 variants have answered" in fidelity.show(Shown(answered, running=request))[0]
    scored = sample.comparison(cells=(sample.REFERENCE, sample.NF4))
    intro, verdicts, *_ = fidelity.show(Shown(scored, running=request))
    assert "still being scored" in intro and "0.321" in verdicts
    assert "still being scored" not in fidelity.show(Shown(scored))[0]
    off = replace(request, fidelity="none")
    assert "Turn it on" in fidelity.show(Shown(answered, running=off))[0], "nothing will be scored"
