"""`--json` of every command: one document on stdout, and nothing there where the request is wrong."""

from __future__ import annotations

import io
import json
import math
import sys

import pytest
import sample
import typer

from comparator.cli import app
from comparator.cli.options import print_json
from comparator.core.result import CellResult
from comparator.reporting import export
from comparator.store import open_store


@pytest.fixture
def saved(own_dirs) -> str:
    """The id of a comparison in a store of its own."""
    cells = tuple(CellResult(name, text=f"Answer of {name}.") for name in ("bf16", "nf4"))
    with open_store() as store:
        return store.save(sample.comparison(cells=cells))


def printed(done) -> object:
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize("name", sorted(typer.main.get_command(app).commands))
def test_every_command_has_it(name):
    options = {o for p in typer.main.get_command(app).commands[name].params for o in p.opts}
    assert "--json" in options


def test_a_number_that_json_lacks_is_null(capsys):
    print_json({"loss": math.nan, "name": "Größe"})
    out = capsys.readouterr().out
    assert json.loads(out) == {"loss": None, "name": "Größe"} and "Größe" in out


def test_backup_and_restore(here, saved, own_dirs):
    file, other = own_dirs / "all.tar.gz", own_dirs / "other"
    counts = {"comparisons": 1, "adapters": 0, "trainings": 0}
    made = printed(here("backup", file, "--json"))
    assert made == {"file": str(file), "bytes": file.stat().st_size} | counts
    refused = here("backup", file, "--json")
    assert refused.code == 2 and refused.out == "" and "already exists" in refused.err
    restored = printed(here("restore", file, "--into", other, "--json"))
    assert restored == {"folder": str(other), "skipped": [], "refused": []} | counts
    again = printed(here("restore", file, "--into", other, "--json"))
    assert again["comparisons"] == 0 and again["skipped"] == [saved]


def test_purge_and_reindex(here, saved, own_dirs):
    assert printed(here("reindex", "--json"))["comparisons"] == 1
    refused = here("purge", saved, "--json")
    assert refused.code == 2 and refused.out == "" and "was not deleted" in refused.err
    with open_store() as store:
        store.delete(saved)
    assert printed(here("purge", "--dry-run", "--json")) == {"dry_run": True, "ids": [saved]}
    removed = {"dry_run": False, "ids": [saved], "still_on_hub": False}
    assert printed(here("purge", "--json")) == removed
    assert printed(here("reindex", "--json"))["comparisons"] == 0


def test_vote_shows_the_pairs_on_stderr(here, tmp_path, monkeypatch):
    cells = tuple(CellResult(name, text=f"Answer of {name}.") for name in ("bf16", "nf4"))
    file = export.write(sample.comparison(cells=cells), tmp_path / "result.json")
    empty = here("vote", file, "--results", "--json")
    assert empty.code == 2 and empty.out == "" and "no votes yet" in empty.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("1\n"))
    done = here("vote", file, "--json")
    votes = printed(done)
    assert [v["choice"] for v in votes["votes"]] == ["left"] and "Answer of nf4." in done.err
    assert sorted(t["rate"] for t in votes["totals"]) == [0.0, 1.0]
    assert printed(here("vote", file, "--results", "--json")) == votes


def test_export(here, two_layers, own_engine, tmp_path):
    done = here("export", "bf16", "-m", two_layers, "--out", tmp_path / "made", "--json", "-q")
    made = printed(done)
    assert done.err == "" and made["variant"] == "bf16" and made["folder"] == str(tmp_path / "made")
    assert made["bytes"] > 0 and made["uploaded"] is None
