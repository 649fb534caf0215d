"""`vote` in the terminal: blind, with the names after the vote, on a file and on a saved comparison."""

from __future__ import annotations

import io
import re
import sys

import pytest
import sample

from comparator.core import document
from comparator.core.result import CellResult
from comparator.core.settings import get_settings
from comparator.reporting import export
from comparator.store import open_store


@pytest.fixture
def voting(here, monkeypatch):
    """`voting("1\\nq\\n", "result.json")` types these lines."""

    def run(typed: str, *arguments: object):
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        return here("vote", *arguments)

    return run


@pytest.fixture
def file(tmp_path):
    cells = tuple(CellResult(name, text=f"Answer {n}.") for n, name in enumerate(("bf16", "nf4", "int8")))
    return export.write(sample.comparison(cells=cells), tmp_path / "result.json")


def test_names_follow_the_last_vote_and_the_document_has_the_votes(voting, file):
    done = voting("1\nx\n2\n4\n", file)
    assert done.code == 0 and not done.err.startswith("Error")
    blind, _, after = done.out.partition(" was ")
    assert not re.search("bf16|nf4|int8", blind), "a name before the last vote"
    assert all(name in after for name in ("bf16", "nf4", "int8")) and "No pair is left" in after
    assert "Blind votes: 3 by 1 visitor" in after
    votes = document.read(file).votes
    assert [v.choice for v in votes.votes] == ["left", "right", "bad"] and len(votes.totals) == 3


def test_each_voter_votes_alone_and_the_results_name_all(voting, here, file):
    voting("1\n1\n1\n", file, "--voter", "Ann")
    second = voting("3\nq\n", file, "--voter", "Bob")
    assert "visitor 2" in second.out and len(document.read(file).votes.votes) == 4
    shown = here("vote", file, "--results")
    assert "win rate" in shown.out and "visitor 1" in shown.out and "left" not in shown.out
    assert "Blind votes: 4 by 2 visitors" in here("show", file).out


def test_names_that_are_shown_end_the_voting_on_these_answers(voting, file):
    done = voting("1\nn\n", file)
    assert "No pair is left" in done.out and len(document.read(file).votes.votes) == 1


def test_without_a_vote_there_are_no_results(voting, file):
    before = file.read_bytes()
    done = voting("", file)
    assert done.code == 2 and "no votes yet" in done.err and file.read_bytes() == before


def test_a_saved_comparison_is_named_by_its_id(voting, tmp_path, monkeypatch, file):
    monkeypatch.setenv("COMPARATOR_DATA_DIR", str(tmp_path / "data"))
    get_settings.cache_clear()
    with open_store() as store:
        id = store.import_file(file)
    done = voting("2\nq\n", id)
    assert done.code == 0, done.err
    with open_store() as store:
        assert len(store.load(id).votes.votes) == 1
    get_settings.cache_clear()
