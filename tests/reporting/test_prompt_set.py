"""A prompt set in reports: every prompt, the flips, and texts that stay data."""

from __future__ import annotations

import csv
import io
import math

import pytest
import sample

from comparator.core import document
from comparator.reporting import export, prompt_set

HOSTILE = "<script>alert(1)</script> | `code` </pre></details> =1+1"


def test_flips_and_shares_are_the_answers():
    comparison = sample.with_set(30)
    reference, other, *_ = prompt_set.summaries(comparison)
    assert (reference.passed, reference.checked, reference.worse) == (24, 30, None)
    # 30 prompts: right → wrong where 3 divides and 5 does not, wrong → right where 5 does and 3 does not
    assert (other.worse, other.better) == (8, 4)
    assert other.p == pytest.approx(math.fsum(math.comb(12, k) for k in range(5)) * 2 / 2**12)
    assert other.kl is not None and other.kl.mean == pytest.approx(0.155) and other.kl.se is not None
    table = prompt_set.rows(comparison)
    flips = [any(row.flips) for row in table]
    assert flips == sorted(flips, reverse=True) and sum(flips) == 14, "what flips does not come first"
    rest = [row.largest_kl for row in table if not any(row.flips)]
    assert rest == sorted(rest, reverse=True), "then not the largest divergence first"


@pytest.mark.parametrize("ending", [".html", ".md", ".prompts.csv"])
def test_a_report_has_every_prompt_and_texts_stay_data(ending: str):
    comparison = sample.with_set(12, HOSTILE)
    text = export.render(comparison, f"a{ending}")
    for prompt in comparison.prompt_set.prompts:
        assert prompt.id in text, f"{prompt.id} is missing"
    assert "(flipped)" in text or ending == ".prompts.csv"
    if ending == ".html":
        assert "<script>alert" not in text and text.count("<details") == text.count("</details>")
    elif ending == ".prompts.csv":
        lines = list(csv.DictReader(io.StringIO(text)))
        assert len(lines) == 12 * 3 and {line["flip"] for line in lines} == {"", "worse", "better"}
    else:
        assert "\\<script" in text
    assert document.loads(document.dumps(comparison)) == comparison
    assert "set-row" not in export.to_html(sample.comparison()), "a report without a set carries its markup"
