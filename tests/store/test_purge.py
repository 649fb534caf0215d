"""Deleted is deleted: what is removed permanently is nowhere any more, however the removal was interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from comparator import store
from comparator.cli import app
from comparator.core.errors import UserError
from comparator.core.result import CellResult, PromptInfo
from comparator.core.settings import Settings
from comparator.store import files, links, open_store, purge
from comparator.store.hub_mirror import Remote
from comparator.store.index import Index
from comparator.util import disk
from tests.hub_stand_in import HubStandIn, connected
from tests.sample import comparison

ROOT = Path(__file__).resolve().parents[2]
REPO = "datasets/me/saved"
SECRET = "A marmalade ostrich nobody else writes about"


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(data_dir=tmp_path / "data", public=False)


def small(prompt: str = SECRET):
    return comparison(prompt=PromptInfo(prompt), cells=(CellResult("bf16", text=prompt[::-1]),))


def in_days(days: float) -> datetime:
    return datetime.now(UTC) + timedelta(days=days)


def age(saved, id: str, **days: float) -> None:
    """Have it been saved or deleted so many days ago: `deleted_at=8`."""
    sidecar = saved.folder.read_sidecar(id)
    past = {name: in_days(-ago).isoformat() for name, ago in days.items()}
    saved.folder.write_sidecar(id, replace(sidecar, **past))
    saved.reindex()


def traces(folder: Path, text: str = SECRET) -> list[str]:
    """The files below a folder with this text in them, in any spelling that the store uses."""
    words = [w.encode() for t in (text, text.casefold(), text[::-1]) for w in (t,)]
    return [p.name for p in folder.rglob("*") if p.is_file() and any(w in p.read_bytes() for w in words)]


def command(*arguments: str):
    return CliRunner().invoke(app, ["purge", *arguments])


# ---------------------------------------------------------------- one comparison


def test_what_is_purged_is_in_no_file_any_more(settings):
    with open_store(settings) as saved:
        kept, gone = saved.save(small("Something else")), saved.save(small(), name="Ostrich")
        assert traces(settings.data_dir), "this test would find nothing anyway"
        saved.delete(gone)
        assert purge.purge(saved, purge.due(saved, purge_days=0), lambda s: bool(s.deleted_at)) == [gone]
        assert not list((settings.data_dir / "comparisons").glob(f"{gone}*"))
        assert traces(settings.data_dir) == [], "its text is still in the data folder"
        for act in (saved.load, saved.entry, saved.undelete, saved.same_prompt):
            with pytest.raises(store.NotFound):
                act(gone)
        assert saved.search(deleted=True) == [] and [e.id for e in saved.search()] == [kept]
    with open_store(settings) as again:
        assert [e.id for e in again.search()] == [kept] and again.reindex() == 1


def test_what_was_brought_back_meanwhile_stays(settings):
    with open_store(settings) as saved:
        id = saved.save(small())
        saved.delete(id)
        chosen = purge.due(saved, purge_days=0)
        saved.undelete(id)  # its owner is faster than the thread
        assert purge.purge(saved, chosen, lambda s: bool(s.deleted_at)) == []
        assert saved.load(id).id == id


@pytest.mark.parametrize("id", ["", "..", "../../secret", "*", "a" * 22 + "/..", "A" * 5000])
def test_ids_with_tricks_remove_nothing(settings, id):
    secret = settings.data_dir.parent / "secret.json"
    secret.write_text("{}")
    with open_store(settings) as saved, pytest.raises(store.BadId):
        saved.purge(id)
    assert secret.exists()


# Where the process ends: before the mark, then after each thing that a removal does to the disk.
STOPS = ["begin", "flush 1", "flush 2", "flush 3", "flush 4", "row", "end"]


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("deleted", [True, False])
def test_a_removal_that_is_cut_off_leaves_nothing_half_visible_and_is_finished_later(settings, stop, deleted):
    with open_store(settings) as saved:
        id = saved.save(small())
        if deleted:
            saved.delete(id)
    child = os.fork()
    if child == 0:
        try:
            _end_at(stop)
            with open_store(settings) as saved:
                saved.purge(id, lambda sidecar: True)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9, "the process was not cut off"
    with open_store(settings) as saved:
        assert saved.search() == [] and saved.search(SECRET.split()[1]) == []
        with pytest.raises((store.Deleted, store.NotFound)):
            saved.load(id)
        saved.start_cleaning(0, 0)  # never by age; but what was begun is finished
        if stop in ("begin", "flush 1"):  # before the mark
            assert saved.purge(id)
        until = time.monotonic() + 10
        while saved.folder.purging() and time.monotonic() < until:
            time.sleep(0.02)
        assert saved.folder.purging() == []
        saved.scrub()
        assert not saved.folder.document_path(id).exists() and not saved.folder.sidecar_path(id).exists()
    assert traces(settings.data_dir) == []


def _end_at(stop: str) -> None:
    """Have this process end, as if it were killed, at a point of the removal."""
    flush, count = disk.flush_folder, [0]
    begun: list[bool] = []

    def end(*_):
        os._exit(9)

    def counted(folder: Path) -> None:
        flush(folder)
        count[0] += bool(begun)
        if stop == f"flush {count[0]}":
            end()

    begin = files.Folder.begin_purge
    files.Folder.begin_purge = (
        end if stop == "begin" else lambda self, id: begun.append(True) or begin(self, id)
    )
    disk.flush_folder = counted
    if stop == "row":
        Index.remove = end
    if stop == "end":
        files.Folder.end_purge = end


def test_two_processes_at_once(settings):
    with open_store(settings) as saved:
        ids = {saved.save(small(f"{SECRET} {n}")) for n in range(30)}
        kept = saved.save(small("Stays"))
        for id in ids:
            saved.delete(id)
    run = [sys.executable, "-m", "comparator", "purge"]
    env = os.environ | {"COMPARATOR_DATA_DIR": str(settings.data_dir)}
    both = [subprocess.Popen(run, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
    with open_store(settings) as saved:
        assert [e.id for e in saved.search()] == [kept] and saved.folder.purging() == []
        assert saved.search(deleted=True) == []
    assert traces(settings.data_dir) == []


# ---------------------------------------------------------------- by age


def test_what_is_due_by_itself(tmp_path):
    public = Settings(data_dir=tmp_path, public=True, retention_days=30)
    assert (Settings().purge_days, Settings().retention_days) == (7, 0)
    with open_store(public) as saved:
        fresh, old, named, deleted, long_gone, undated = (saved.save(small(), "me") for _ in range(6))
        saved.rename(named, "Keep this", "me")
        for id in (deleted, long_gone, undated):
            saved.delete(id, "me")
        age(saved, old, saved_at=31)
        age(saved, named, saved_at=400)
        age(saved, deleted, deleted_at=6.9)
        age(saved, long_gone, deleted_at=7.1)
        sidecar = saved.folder.read_sidecar(undated)
        saved.folder.write_sidecar(undated, replace(sidecar, deleted_at="yesterday"))
        saved.reindex()
        assert purge.Cleaner(saved, 0, 0).clean(in_days(900)) == [], "0 is never"
        cleaner = purge.Cleaner(saved, public.purge_days, public.retention_days)
        assert set(cleaner.clean()) == {old, long_gone}
        assert set(cleaner.clean(in_days(1))) == {deleted}
        assert set(cleaner.clean(in_days(31))) == {fresh}
        assert saved.load(named).id == named, "a comparison with a name is kept"
        assert saved.entry(undated).deleted_at == "yesterday", "a date that cannot be read makes nothing due"


def test_retention_is_for_public_servers_only(settings):
    with open_store(settings) as saved:
        saved.save(small())
        assert purge.Cleaner(saved, 7, 30).clean(in_days(400)) == []


def test_a_deletion_wakes_the_thread_and_does_not_wait_for_it(settings, monkeypatch):
    with open_store(settings) as saved:
        old, new = saved.save(small()), saved.save(small())
        saved.start_cleaning(7, 0)
        saved.delete(old)
        age(saved, old, deleted_at=8)
        began = time.monotonic()
        saved.delete(new)
        assert time.monotonic() - began < 2
        until = time.monotonic() + 10
        while saved.folder.document_path(old).exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert not saved.folder.document_path(old).exists()
        assert saved.entry(new).deleted_at, "deleted just now: it can still be brought back"


# ---------------------------------------------------------------- copies on the Hub


def test_the_copy_on_the_hub_goes_with_its_history_and_does_not_come_back(tmp_path, monkeypatch):
    with HubStandIn() as hub, connected(hub, monkeypatch):
        disk = files.Folder(tmp_path / "a")
        disk.create()
        copies = Remote("me/saved", disk, pause_s=0.0, retry_s=0.1, first_wait_s=0.01)
        with store.Store(disk, public=False, index_dir=disk.root, upload_bytes=10**7, remote=copies) as saved:
            copies.start(saved.adopt)
            kept, gone = saved.save(small("Stays")), saved.save(small())
            assert copies.wait(20)
            copy = {path: data for path, data in hub.repos[REPO].files.items() if gone in path}
            saved.delete(gone)
            hub.stop()
            assert saved.purge(gone), "it waits for the Hub"
            assert disk.purging() == [gone]
            with pytest.raises(store.NotFound):
                saved.load(gone)
            hub.start()
            assert copies.wait(30), "the Hub is back and the copy is still there"
            repo = hub.repos[REPO]
            assert not [path for path in repo.files if gone in path] and [p for p in repo.files if kept in p]
            assert not [p for files_then in repo.history for p in files_then if gone in p], (
                "the history has it"
            )
            # A download that was under way, and an upload that another process had begun.
            document, side = (copy[f"comparisons/{gone[:2]}/{gone}{end}"] for end in (".json", ".meta.json"))
            with pytest.raises(store.NotFound):
                saved.adopt(gone, document, side)
            assert not disk.document_path(gone).exists() and not disk.sidecar_path(gone).exists()
        repo.files.update(copy)  # whatever put it there
        with store.Store(disk, public=False, index_dir=disk.root, upload_bytes=10**7) as saved:
            assert [e.id for e in saved.search()] == [kept]


# ---------------------------------------------------------------- the command


def test_the_command(own_dirs):
    with open_store() as saved:
        kept, old, new = saved.save(small("Stays")), saved.save(small()), saved.save(small())
        saved.delete(old)
        saved.delete(new)
        age(saved, old, deleted_at=10)
    shown = command("--dry-run")
    assert shown.exit_code == 0 and old in shown.output and new in shown.output and kept not in shown.output
    assert "2 comparisons would be removed" in shown.output and SECRET[:20] in shown.output
    assert "1 comparison removed permanently" in command("--older-than", "9").output
    for arguments, problem in (
        ([kept], "was not deleted"),
        ([new, "--older-than", "3"], "less than 3 days ago"),
        ([links.new_id()], "no comparison with this id"),
        (["--kept-too"], "needs the ids"),
    ):
        refused = command(*arguments)
        assert isinstance(refused.exception, UserError) and problem in refused.exception.problem
    assert "1 comparison removed" in command(new).output
    assert "1 comparison removed" in command("--kept-too", kept).output
    assert "0 comparisons removed" in command().output
    with open_store() as saved:
        assert saved.count() == 0 and saved.search(deleted=True) == []


def test_a_damaged_comparison_can_be_removed(own_dirs):
    with open_store() as saved:
        id = saved.save(small())
        saved.folder.document_path(id).write_text("{")
        saved.folder.sidecar_path(id).write_text("[")
    assert "1 comparison removed" in command("--kept-too", id).output
    assert not list((own_dirs / "data" / "comparisons").iterdir())
