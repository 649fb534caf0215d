"""Which column is recommended, and that none is where the measurement does not carry it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sample

from comparator.core.result import CellResult, Fidelity, Latency, Memory, RunFigures
from comparator.metrics.interference import Interference
from comparator.reporting.prompt_set import ColumnSummary
from comparator.reporting.recommendation import recommend
from comparator.util import stats


def column(
    name: str, megabytes: float, speeds: tuple[float, ...] = (), agreement: float | None = None,
    kl: float = 0.1, tokens: int = 2048, **rest,
) -> CellResult:  # fmt: skip
    """A measured column: its memory, the speed of each run, its agreement with the reference on a text."""
    text = {"kl": {"mean": kl, "se": 0.002}, "top1": {"mean": agreement, "se": 0.006}, "tokens": tokens}
    runs = tuple(RunFigures(ttft_s=0.1, decode_tok_s=speed) for speed in speeds)
    return CellResult(
        name, text="a", token_ids=(1, 2), memory=Memory(resident_bytes=int(megabytes * 1e6)),
        latency=Latency(runs=runs, decode_tok_s=sorted(speeds)[len(speeds) // 2] if speeds else None),
        fidelity=None if agreement is None else Fidelity(text=text), **rest,
    )  # fmt: skip


BF16 = column("bf16", 270, (10.0, 10.1, 10.2))
INT8 = column("int8", 160, (5.0, 5.1, 5.2), 0.93, 0.03)
NF4 = column("nf4", 115, (14.0, 14.1, 14.2), 0.73, 0.32)


def choices(found) -> dict[str, str | None]:
    return {c.goal: c.cell.variant if c.cell else None for c in found.choices}


def test_each_goal_has_its_column():
    found = recommend([BF16, INT8, NF4], BF16)
    assert choices(found) == {"smallest": "nf4", "fastest": "nf4", "most faithful": "int8"}
    assert found.sentence.startswith(
        "Take int8: 41 % less memory than bf16, 1.98× slower, the same most likely token"
    )
    assert "93.0 ± 0.6 % of 2,048 positions" in found.sentence and not found.next_steps


def test_of_two_of_one_size_the_more_faithful_is_taken():
    twin = column("torchao", 164, (4.0, 4.1, 4.2), 0.958, 0.004)
    assert recommend([BF16, INT8, twin], BF16).sentence.startswith("Take torchao")


def test_where_none_is_close_the_reference_stays():
    found = recommend([BF16, NF4], BF16)
    assert found.sentence.startswith("Keep bf16 unless memory matters most: nf4 is the closest")


def test_a_single_answer_is_only_probable():
    found = recommend(
        [BF16, replace(INT8, fidelity=Fidelity(text={**INT8.fidelity.text, "tokens": 40}))], BF16
    )
    assert found.sentence.startswith("Probably int8") and any("score a text" in s for s in found.next_steps)


def test_an_agreement_within_its_error_of_the_limit_is_only_probable():
    text = {**INT8.fidelity.text, "top1": {"mean": 0.905, "se": 0.006}}
    assert recommend([BF16, replace(INT8, fidelity=Fidelity(text=text))], BF16).sentence.startswith(
        "Probably int8"
    )


@pytest.mark.parametrize("speeds", [(14.0,), (14.0, 14.1)])
def test_no_word_on_speed_from_too_few_runs(speeds):
    found = recommend([BF16, replace(NF4, latency=column("x", 1, speeds).latency)], BF16)
    assert choices(found)["fastest"] is None and "as fast" not in found.sentence
    assert any("at least 3" in step for step in found.next_steps)


def test_disturbed_runs_carry_nothing():
    runs = tuple(replace(run, interference=Interference("busy")) for run in NF4.latency.runs)
    found = recommend([BF16, replace(NF4, latency=replace(NF4.latency, runs=runs))], BF16)
    assert choices(found)["fastest"] is None and any("nothing else uses" in step for step in found.next_steps)


def test_all_slower_means_the_reference_is_the_fastest():
    assert choices(recommend([BF16, INT8], BF16))["fastest"] == "bf16"


def test_quality_that_was_not_measured_is_said():
    plain = replace(NF4, fidelity=None)
    found = recommend([BF16, plain], BF16)
    assert "Quality was not measured" in found.sentence and choices(found)["most faithful"] is None


def test_nothing_smaller():
    fp32 = column("fp32", 540, (5.0, 5.1, 5.2), 0.99, 0.001)
    assert recommend([BF16, fp32], BF16).sentence == "No variant takes less memory than bf16."


def test_two_divergences_within_their_error_are_not_ranked():
    twin = replace(
        NF4, variant="fp4", fidelity=Fidelity(text={**NF4.fidelity.text, "kl": {"mean": 0.321, "se": 0.002}})
    )
    words = {c.goal: c.words for c in recommend([BF16, NF4, twin], BF16).choices}
    assert "no measurable difference to fp4" in words["most faithful"]


def test_one_column_alone_a_failed_reference_and_other_adapters_give_nothing():
    assert recommend([BF16], BF16) is None
    assert recommend([BF16, NF4], None) is None
    assert recommend([BF16, NF4], replace(BF16, status="failed")) is None
    assert recommend([BF16, replace(NF4, adapter="pirate")], BF16) is None


def test_a_saved_comparison_with_a_failed_column():
    whole = sample.comparison()
    found = recommend(whole.cells, whole.cells[0])
    assert "nf4" in found.sentence and "int8" not in found.sentence, (
        "a column that failed cannot be recommended"
    )


def summary(
    label: str, passed: int, worse: int | None, better: int | None, agreement: float = 0.95
) -> ColumnSummary:
    p = None if worse is None or better is None else stats.mcnemar(worse, better)
    return ColumnSummary(
        label,
        40,
        passed,
        40,
        stats.wilson(passed, 40),
        None,
        False,
        stats.Mean(agreement, 0.005),
        1200,
        worse,
        better,
        p,
    )


def test_a_prompt_set_decides_where_no_text_was_scored():
    plain = [replace(c, fidelity=None) for c in (BF16, INT8, NF4)]
    sets = [summary("bf16", 30, None, None), summary("int8", 29, 2, 1), summary("nf4", 15, 16, 1)]
    found = recommend(plain, plain[0], sets)
    assert found.sentence.startswith("Take int8:"), "agreement over a set did not count, or its harm did not"
    assert found.sentence.endswith("3 of 40 checks flipped (2 to wrong, 1 to right; p = 1).")
    assert choices(found)["most checks passed"] == "bf16" and not any(
        "Quality" in step for step in found.next_steps
    )
    words = next(c.words for c in found.choices if c.goal == "most checks passed")
    assert words == "30 of 40 (the intervals of int8 overlap)"


def test_the_best_of_a_figure_is_named_only_where_the_measurement_supports_it():
    """The smallest always; the fastest with those that are not measurably slower; nothing where too few runs tell."""
    whole = sample.comparison()
    found = recommend(whole.cells, whole.cells[0])
    assert found.best["resident_bytes"] == {"nf4"}
    assert "decode_tok_s" not in found.best, "14.2 … 15.1 overlaps 14.9 … 15.2"
    assert "prompt_kl_mean" not in found.best, (
        "the divergence over the text decided, not the one that the summary shows"
    )
    alone = replace(sample.NF4, fidelity=replace(sample.NF4.fidelity, text={}))
    assert recommend((sample.REFERENCE, alone), sample.REFERENCE).best["prompt_kl_mean"] == {"nf4"}
