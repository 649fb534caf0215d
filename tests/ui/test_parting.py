"""Where two answers part, and the probabilities of both candidates there."""

from __future__ import annotations

from dataclasses import replace

import sample

from comparator.core.result import TopToken
from comparator.ui.parting import Candidate, Parting, parting
from comparator.ui.tabs import differences


def nf4_and_reference():
    comparison = sample.comparison()
    return comparison.cell("nf4"), comparison.cell("bf16")


def test_both_candidates_and_their_probabilities():
    cell, reference = nf4_and_reference()
    prompt = cell.fidelity.prompt
    at = next(
        n
        for n, pair in enumerate(zip(cell.token_ids, reference.token_ids, strict=False))
        if len(set(pair)) > 1
    )
    rest = cell.text[len("".join(prompt.tokens[:at])) :]
    own = TopToken(rest[:5], 0.5)
    tops = [*prompt.top]
    tops[at] = (own, *tops[at])
    reference_tops = [*prompt.reference_top]
    reference_tops[at] = (*reference_tops[at], TopToken(own.token, 0.125))
    changed = replace(prompt, top=tuple(tops), reference_top=tuple(reference_tops))
    place = parting(replace(cell, fidelity=replace(cell.fidelity, prompt=changed)), reference)
    assert place == Parting(
        at, Candidate(prompt.tokens[at], prompt.reference_p[at], prompt.p[at]), Candidate(own.token, 0.125, 0.5)
    )  # fmt: skip
    words = differences.in_words(cell, reference, place)
    assert f"diverge at token {at + 1}" in words and "50.0 %; bf16: 12.5 %" in words, words


def test_without_scores_the_place_is_still_known():
    cell, reference = nf4_and_reference()
    place = parting(replace(cell, fidelity=None), reference)
    assert place is not None and place.reference is None and place.column is None
    assert parting(reference, reference) is None


def test_what_a_model_wrote_is_text():
    comparison = sample.comparison()
    cells = [
        replace(c, text="<img src=x onerror=alert(1)> " + c.text) if c.variant == "nf4" else c
        for c in comparison.cells
    ]
    page = differences.view_of(replace(comparison, cells=tuple(cells)))
    assert "part" in page and "<img" not in page
