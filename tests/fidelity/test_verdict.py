"""What a verdict may say: nothing that the runs do not carry, and no win of a variant over what it was made from."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sample

from comparator.core.result import CellResult, Fidelity, Interference, PromptFidelity, RunFigures, TopToken
from comparator.fidelity import verdict
from comparator.util import formatting


def paced(cell: CellResult, *rates: float, disturbed: int = 0) -> CellResult:
    """The column with runs at these rates, of which the first `disturbed` were disturbed."""
    runs = tuple(
        RunFigures(0.2, rate, interference=Interference("a busy process" if n < disturbed else None))
        for n, rate in enumerate(rates)
    )
    return replace(
        cell, latency=replace(cell.latency, decode_tok_s=sorted(rates)[len(rates) // 2], runs=runs)
    )


def scored(cell: CellResult, **text) -> CellResult:
    return replace(cell, fidelity=Fidelity(sample.PROMPT_FIDELITY, {**sample.TEXT_FIDELITY, **text}))


def answer(cell: CellResult, *positions: tuple[float, ...], **figures) -> CellResult:
    """The column with these probabilities of the most likely tokens, by position."""
    top = tuple(tuple(TopToken(f"t{n}", p) for n, p in enumerate(position)) for position in positions)
    zeros = (0.0,) * len(top)
    prompt = PromptFidelity(kl=zeros, rank=(0,) * len(top), p=zeros, top=top, reference_top=top)
    return replace(cell, fidelity=Fidelity(replace(prompt, **figures)))


SLOW = paced(sample.REFERENCE, 10.0, 10.1, 10.2)
FAST = paced(sample.NF4, 14.4, 14.6, 14.5)


def test_speed_gets_a_word_only_from_three_runs_that_carry_it():
    assert verdict.speed_words(FAST, SLOW) == "1.44× as fast"
    assert verdict.speed_words(SLOW, FAST) == "1.44× slower"
    assert verdict.speed_words(paced(sample.NF4, 14.4), paced(sample.REFERENCE, 10.0)) == "", "one run"
    assert verdict.speed_words(paced(sample.NF4, 10.3, 9.9, 11.0), SLOW) == "", "the runs overlap"
    assert verdict.speed_words(paced(sample.NF4, 10.20, 10.22, 10.21), SLOW) == "", "a difference of 1 %"
    assert verdict.times_as_fast(FAST, SLOW, "ttft_s") == pytest.approx(0.2125 / 0.3), (
        "of a time, less is faster"
    )


def test_disturbed_runs_carry_nothing():
    assert verdict.speed_words(paced(sample.NF4, 14.4, 14.6, 14.5, disturbed=3), SLOW) == ""
    assert verdict.speed_words(FAST, paced(sample.REFERENCE, 5.0, 5.1, 5.2, disturbed=3)) == ""
    assert verdict.speed_words(paced(sample.NF4, 5.0, 14.4, 14.6, 14.5, disturbed=1), SLOW) == "1.44× as fast"


def test_an_adapter_makes_no_base_faster():
    adapted = replace(FAST, variant="bf16", adapter="pirate")
    assert verdict.speed_words(adapted, SLOW) == "", "bf16 with an adapter computes all that bf16 does"
    assert (
        verdict.speed_words(replace(SLOW, adapter="pirate"), replace(FAST, variant="bf16")) == "1.44× slower"
    )


def test_a_model_against_itself_is_no_difference():
    same = answer(
        paced(replace(sample.REFERENCE, variant="bf16@copy"), 14.4, 14.6, 14.5), (0.9, 0.1), (0.6, 0.2)
    )
    assert verdict.words(same, SLOW) == "no difference" and verdict.speed_words(same, SLOW) == ""


def test_equal_logits_are_broken_on_either_side():
    uniform = answer(sample.NF4, *[(1 / 49152,) * 5] * 4)
    assert verdict.words(uniform, sample.REFERENCE) == "broken: every token is equally likely"
    reference = replace(uniform, variant="bf16")
    assert verdict.words(reference, reference).startswith("broken"), "a broken reference is called one"
    assert verdict.words(sample.NF4, reference) == "the reference is broken"


def test_probabilities_that_never_change_are_broken():
    assert verdict.fault(answer(sample.NF4, *[(0.5, 0.3)] * verdict.POSITIONS))
    assert not verdict.fault(answer(sample.NF4, *[(0.5, 0.3)] * 3)), (
        "three equal positions may be a short loop"
    )
    assert not verdict.fault(sample.NF4) and not verdict.fault(sample.FAILED)


@pytest.mark.parametrize(
    ("agreement", "ratio", "words"),
    [
        (0.99, 0.97, "no difference"),
        (0.93, 0.90, "no difference"),
        (0.80, 0.97, "different"),
        (0.50, 0.60, "broken: it predicts the text better than its reference"),
        (0.50, 1.60, "very different"),
    ],
)
def test_better_than_the_reference_is_never_a_win(agreement, ratio, words):
    cell = scored(
        sample.NF4, top1={"mean": agreement, "se": 0.002}, ppl_ratio=ratio, ppl_ratio_se=0.002,
        kl={"mean": 1.0, "se": 0.01},
    )  # fmt: skip
    assert verdict.words(cell, sample.REFERENCE) == words


def test_ratios_in_words():
    assert formatting.amount(0.61, "memory") == "39 % less memory"
    assert formatting.amount(1.12) == "12 % more" and formatting.amount(2.31, "memory") == "2.31× the memory"
    assert formatting.amount(1.01, "memory") == "same memory" and formatting.amount(None) == ""
    assert formatting.pace(1.45) == "1.45× as fast" and formatting.pace(1 / 16.9) == "16.9× slower"
