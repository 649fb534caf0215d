"""The index of saved comparisons is only an index: lost, broken or of another version, it is made again."""

from __future__ import annotations

import os
import shutil
import sqlite3
from dataclasses import replace

import pytest
from store_helpers import asked, contents, index_files

from comparator.core import document
from comparator.core.settings import Settings
from comparator.store import index as index_module
from comparator.store import links, open_store
from comparator.store.files import summarize
from comparator.store.schema import VERSION
from tests.sample import comparison

# ---------------------------------------------------------------- the index is only an index


@pytest.fixture
def filled(settings):
    """A store with named, deleted and imported comparisons, and what its history looks like."""
    with open_store(settings) as saved:
        ids = [saved.save(asked(f"Prompt {i}"), f"owner {i % 2}") for i in range(6)]
        saved.rename(ids[1], "A name")
        saved.delete(ids[2])
        sent = settings.data_dir.parent / "sent.json"
        sent.write_text(document.dumps(asked("Imported")))
        saved.import_file(sent)
        before = contents(saved)
    assert len(before) == 7
    return settings, before


@pytest.mark.parametrize("harm", ["removed", "emptied", "garbage", "cut", "a page overwritten", "no tables"])
def test_a_lost_or_broken_index_is_made_again_with_nothing_lost(filled, harm):
    settings, before = filled
    (path,) = index_files(settings.data_dir)
    if harm == "removed":
        path.unlink()
    elif harm == "emptied":
        path.write_bytes(b"")
    elif harm == "garbage":
        path.write_bytes(os.urandom(50_000))
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:6000])
    elif harm == "a page overwritten":
        data = bytearray(path.read_bytes())
        data[4096:] = os.urandom(len(data) - 4096)
        path.write_bytes(data)
    else:
        with sqlite3.connect(path) as db:
            db.execute("DROP TABLE search")
            db.execute("DROP TABLE comparisons")
        db.close()
    with open_store(settings) as saved:
        assert contents(saved) == before, f"after the index was {harm}"
        assert saved.load(before[0].id).id == before[0].id
    assert len(index_files(settings.data_dir)) == 1, "the broken index was left lying about"


def test_an_index_that_goes_away_while_it_is_open_is_made_again(filled):
    settings, before = filled
    with open_store(settings) as saved, open_store(settings) as other:
        assert contents(other) == before
        for path in settings.data_dir.glob("index-*"):
            path.unlink()
        assert contents(saved) == before
        id = saved.save(asked("Later"))
        assert [e.id for e in other.search("later")] == [id], "two processes use two different indexes"


def test_reindex_counts_and_finds_what_was_put_there_by_hand(filled, tmp_path):
    settings, before = filled
    elsewhere = Settings(data_dir=tmp_path / "elsewhere", public=False)
    with open_store(elsewhere) as other:
        moved = other.save(asked("From a backup"), "me", name="Moved")
    with open_store(settings) as saved:
        for path in (elsewhere.data_dir / "comparisons").iterdir():
            shutil.copy(path, settings.data_dir / "comparisons" / path.name)
        alone = links.new_id()  # a document without its sidecar
        saved.folder.document_path(alone).write_text(document.dumps(asked("Alone", id=alone)))
        (settings.data_dir / "comparisons" / "notes.txt").write_text("not a comparison")
        (settings.data_dir / "comparisons" / "other.json").write_text("{}")
        saved.folder.document_path(links.new_id()).write_text("{broken")
        assert saved.reindex() == len(before) + 2
        assert saved.search("backup")[0].name == "Moved" and saved.search("backup")[0].id == moved
        assert saved.search("alone")[0].id == alone
    with open_store(settings) as again:
        assert again.count() + again.count(deleted=True) == len(before) + 2


def test_where_no_index_can_be_kept_the_history_works_all_the_same(settings, tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    settings = settings.model_copy(update={"index_dir": blocked / "index"})
    with open_store(settings) as saved:
        id = saved.save(asked("Hello"))
        assert [e.id for e in saved.search("hello")] == [id]
        saved.rename(id, "Named")
        assert saved.search("named")[0].id == id


def test_a_change_made_by_a_process_that_died_in_the_middle_is_found(filled, monkeypatch):
    settings, _ = filled
    monkeypatch.setattr(index_module, "_RECHECK_S", 0.0)
    with open_store(settings) as saved:
        id = links.new_id()
        there = replace(asked("Written but never indexed"), id=id)
        old = saved.search("prompt 5")[0]
        with open_store(settings) as dying:  # the files of a save and of a rename, without their rows
            sidecar = replace(dying.folder.read_sidecar(old.id), name="Renamed", summary=summarize(there))
            dying.folder.write(id, document.dumps(there).encode(), sidecar)
            dying.folder.write_sidecar(
                old.id, replace(dying.folder.read_sidecar(old.id), name="Renamed as well")
            )
        assert [e.id for e in saved.search("never indexed")] == [id]
        assert [e.id for e in saved.search("as well")] == [old.id]


# ---------------------------------------------------------------- other versions


@pytest.mark.parametrize("version", [0, VERSION - 1, VERSION + 1])
def test_an_index_of_another_version_is_made_anew(filled, version):
    settings, before = filled
    (path,) = index_files(settings.data_dir)
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE comparisons (id TEXT PRIMARY KEY, stamp TEXT NOT NULL, mood TEXT)")
        db.execute(f"PRAGMA user_version = {version}")
    db.close()
    with open_store(settings) as saved:
        assert contents(saved) == before
        assert saved.search("prompt 4"), "the search text was not filled in"
    (new,) = index_files(settings.data_dir)
    with sqlite3.connect(new) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (VERSION,)
    db.close()


def test_a_clock_that_went_back_does_not_keep_an_old_index(settings, monkeypatch):
    with open_store(settings) as saved:
        saved.save(comparison())
        saved.count()
        old = saved._index._path
        monkeypatch.setattr(index_module.time, "time_ns", lambda: 1_000_000_000)
        saved._index._begin_anew = True
        assert saved.count() == 1
        assert saved._index._path.name > old.name, "other processes would keep the older index"
