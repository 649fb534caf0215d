"""Win rates of blind votes in every report: the same figures, nothing without a vote, names as text."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace

import pytest
import sample

from comparator.comparison.standings import standings
from comparator.core import document
from comparator.core.votes import Judge, Judgement, Vote, Votes
from comparator.reporting import export

VOTES = (
    Vote(0, 0, 1, "left", "a"), Vote(0, 1, 2, "left", "a"), Vote(0, 2, 0, "tie", "a"), Vote(0, 1, 0, "bad", "b"),
)  # fmt: skip


@pytest.fixture
def voted():
    plain = sample.comparison()
    return replace(plain, votes=Votes(VOTES, standings(plain, VOTES)))


def test_json_has_votes_and_totals_and_is_read_again(voted):
    text = export.render(voted, "x.json")
    assert document.loads(text) == voted
    written = json.loads(text)["votes"]
    assert [t["label"] for t in written["totals"]] == [c.label for c in voted.cells[:3]]
    assert "votes" not in json.loads(export.render(sample.comparison(), "x.json"))


def test_csv_has_a_columns_votes_and_nothing_where_there_are_none(voted):
    rows = list(csv.DictReader(io.StringIO(export.render(voted, "x.csv"))))
    first = standings(voted)[0]
    assert (rows[0]["votes"], rows[0]["votes_won"], rows[0]["votes_both_bad"]) == ("3", "1", "1")
    assert float(rows[0]["win_rate"]) == first.rate and float(rows[0]["win_rate_low"]) == first.low
    assert rows[3]["votes"] == rows[3]["win_rate"] == "", "the column that failed was never voted on"
    plain = list(csv.DictReader(io.StringIO(export.render(sample.comparison(), "x.csv"))))
    assert {row["win_rate"] for row in plain} == {""}


@pytest.mark.parametrize("name", ["x.md", "x.html"])
def test_reports_have_the_totals_and_each_visitors_rates(voted, name):
    text = re.sub(r"[*\\]", "", export.render(voted, name))
    first = standings(voted)[0]
    assert "Blind votes: 4 by 2 visitors" in text and "Bradley–Terry" in text
    assert f"{first.rate * 100:.0f} %" in text and f"{first.low * 100:.0f} – {first.high * 100:.0f} %" in text
    assert "visitor 1" in text and "visitor 2" in text
    assert "Blind votes" not in export.render(sample.comparison(), name)


def test_reports_have_each_judge_with_its_agreement_and_html_its_reasons():
    said = (
        Judgement(0, 0, 1, "left", "left", ("<i>Right.</i>", "It is right.")),
        Judgement(0, 1, 2, "left", None),
    )
    judge = Judge("a_model", "int8", "Which is better? {a} {b}", said)
    judged = replace(sample.comparison(), votes=Votes(VOTES, judges=(judge,)))
    for name in ("x.md", "x.html"):
        text = export.render(judged, name).replace("\\", "")
        assert "Judge int8 of a_model: 2 pairs" in text and "1 of 2 human votes" in text, name
        assert "1 pair without a verdict" in text and "disagreed on 0 of 1 pair" in text, name
    html = export.render(judged, "x.html")
    assert "&lt;i&gt;Right.&lt;/i&gt;" in html and "<i>Right" not in html and "{a} {b}" in html
    assert document.loads(export.render(judged, "x.json")) == judged
