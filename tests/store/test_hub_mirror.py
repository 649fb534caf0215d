"""Copies on the Hub, against a local stand-in that is reached through the real client library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from comparator import store
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.store import Store, hub_mirror, links
from comparator.store.files import Folder, format_sidecar
from comparator.store.hub_mirror import Remote, durability, open_remote
from tests.hub_stand_in import TOKEN, HubStandIn, connected
from tests.sample import comparison

REPO = "me/saved"
KEY = f"datasets/{REPO}"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def hub(monkeypatch):
    with HubStandIn() as stand_in, connected(stand_in, monkeypatch):
        yield stand_in


@contextmanager
def machine(folder: Path, *, public: bool = False, **times):
    """A machine with its own disk whose store is copied to the stand-in."""
    disk = Folder(folder)
    disk.create()
    copies = Remote(REPO, disk, **{"pause_s": 0.0, "retry_s": 0.1, "first_wait_s": 0.01, **times})
    with Store(disk, public=public, index_dir=folder, upload_bytes=32_000_000, remote=copies) as saved:
        copies.start(saved.adopt)
        yield saved


def eventually(condition, seconds: float = 20.0) -> bool:
    end_s = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.02)
    return True


def test_a_link_outlives_the_machine_it_was_made_on(hub, tmp_path):
    with machine(tmp_path / "first") as first:
        id = first.save(comparison(), "me", name="StoredLogits")
        assert first.remote.wait(20), "nothing was uploaded"
        original = first.load(id)
    assert hub.repos[KEY].created_with["visibility"] == "private", "people's prompts would be public"
    assert set(hub.repos[KEY].files) == {
        f"comparisons/{id[:2]}/{id}.json",
        f"comparisons/{id[:2]}/{id}.meta.json",
    }
    with machine(tmp_path / "second", retry_s=60.0) as second:
        assert second.load(id) == original
        assert second.entry(id).name == "StoredLogits"
        hub.stop()
        assert second.load(id) == original, "once here, it does not need the Hub again"


def test_the_history_comes_back_after_the_disk_was_lost(hub, tmp_path):
    hub.page_size = 3  # listings come in pages
    with machine(tmp_path / "first", public=True) as first:
        ids = {first.save(comparison(), f"visitor {n % 2}") for n in range(6)}
        gone = first.save(comparison(), "visitor 0")
        first.delete(gone, "visitor 0")
        assert first.remote.wait(20)
    with machine(tmp_path / "second", public=True) as second:
        assert eventually(
            lambda: second.count(owner="visitor 0") == 3 and second.count(owner="visitor 1") == 3
        )
        assert {e.id for n in range(2) for e in second.search(owner=f"visitor {n}")} == ids
        assert eventually(lambda: len(second.search(owner="visitor 0", deleted=True)) == 1)
        with pytest.raises(store.Deleted):
            second.load(gone)
        assert second.remote.status().pending == 0, "what came from the Hub is uploaded again"


def test_what_was_saved_before_the_copy_was_set_up_goes_up_too(hub, tmp_path):
    disk = Folder(tmp_path)
    disk.create()
    with Store(disk, public=False, index_dir=tmp_path, upload_bytes=10**7) as alone:
        id = alone.save(comparison())
    with machine(tmp_path):
        assert eventually(
            lambda: KEY in hub.repos and f"comparisons/{id[:2]}/{id}.json" in hub.repos[KEY].files
        )


def test_several_comparisons_are_one_commit_and_later_changes_follow(hub, tmp_path):
    with machine(tmp_path / "a", pause_s=0.3) as saved:
        saved.save(comparison())
        assert saved.remote.wait(20)
        ids = [saved.save(comparison()) for _ in range(5)]
        assert saved.remote.wait(20)
        assert len(hub.repos[KEY].commits) <= 4, "a commit each: the Hub allows some 128 an hour"
        saved.rename(ids[0], "A later name")
        saved.delete(ids[1])
        assert saved.remote.wait(20)
        side = {id: json.loads(hub.repos[KEY].files[f"comparisons/{id[:2]}/{id}.meta.json"]) for id in ids}
        assert side[ids[0]]["name"] == "A later name" and side[ids[1]]["deleted_at"]


def test_with_the_hub_away_the_app_works_says_so_and_uploads_later(hub, tmp_path):
    hub.stop()
    with machine(tmp_path / "a") as saved:
        start_s = time.perf_counter()
        id = saved.save(comparison())
        saved.rename(id, "Named meanwhile")
        assert time.perf_counter() - start_s < 5, "saving waits for the Hub"
        assert saved.load(id).id == id and saved.search()[0].name == "Named meanwhile"
        assert eventually(lambda: saved.status != "")
        assert "only on this machine" in saved.status and "cannot be reached" in saved.status
        assert saved.remote.status().pending == 1
        with pytest.raises(UserError, match="cannot be fetched now") as caught:
            saved.load(links.new_id())
        assert not isinstance(caught.value, store.NotFound), "it may well be there: nobody could look"
        hub.start()
        assert saved.remote.wait(30), "the Hub is back and nothing was uploaded"
        assert eventually(lambda: saved.status == "")
        assert (
            json.loads(hub.repos[KEY].files[f"comparisons/{id[:2]}/{id}.meta.json"])["name"]
            == "Named meanwhile"
        )


def test_what_waits_is_remembered_by_the_disk(hub, tmp_path):
    hub.stop()
    with machine(tmp_path / "a") as saved:
        id = saved.save(comparison())
        assert eventually(lambda: saved.remote.status().error)
    hub.start()
    with machine(tmp_path / "a") as again:
        assert again.remote.wait(20)
    assert f"comparisons/{id[:2]}/{id}.json" in hub.repos[KEY].files


@pytest.mark.parametrize(
    ("code", "said"), [(503, "error 503"), (500, "error 500"), (403, "HF_TOKEN"), (429, "error 429")]
)
def test_errors_of_the_hub_are_told_and_passed(hub, tmp_path, code, said):
    hub.fail = code
    with machine(tmp_path / "a") as saved:
        saved.save(comparison())
        assert eventually(lambda: said in saved.status), saved.status
        assert TOKEN not in saved.status and "http" not in saved.status
        hub.fail = None
        assert saved.remote.wait(30)
        assert eventually(lambda: saved.status == "")


def test_a_wrong_token_is_named(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrongwrongwrongwrongwrong")
    with machine(tmp_path / "a") as saved:
        saved.save(comparison())
        assert eventually(lambda: "HF_TOKEN" in saved.status), saved.status


def test_a_slow_hub_keeps_nobody_waiting_to_save(hub, tmp_path):
    with machine(tmp_path / "a") as saved:
        saved.save(comparison())
        assert saved.remote.wait(20)
        hub.delay_s = 3.0
        start_s = time.perf_counter()
        for _ in range(3):
            saved.load(saved.save(comparison()))
        assert time.perf_counter() - start_s < 9, "a save waits for the Hub, which takes 3 s an answer"
        hub.delay_s = 0.0


def test_an_id_that_nobody_has_is_not_asked_for_again_and_again(hub, tmp_path):
    with machine(tmp_path / "a", retry_s=60.0) as saved:
        assert eventually(lambda: KEY in hub.repos)
        id = links.new_id()
        asked = []
        for _ in range(5):
            with pytest.raises(store.NotFound):
                saved.load(id)
            asked.append(sum(id in path for _, path in hub.requests))
        assert asked == [1] * 5, f"the Hub was asked {asked[-1]} times"
        for bad in ("../../x", "A" * 21 + "B"):
            with pytest.raises(store.BadId):
                saved.load(bad)
        assert not any("etc" in path or ".." in path for _, path in hub.requests)


@pytest.mark.parametrize("what", ["not json", "another id", "too large", "hostile sidecar", "nan"])
def test_what_the_hub_has_is_judged_as_a_strangers(hub, tmp_path, what):
    with machine(tmp_path / "a", retry_s=60.0) as saved:
        assert eventually(lambda: KEY in hub.repos)
        id = links.new_id()
        text = document.dumps(replace(comparison(), id=id))
        side = b'{"saved_at": "x", "owner": 7}' if what == "hostile sidecar" else None
        data = {
            "not json": b"<script>alert(1)</script>",
            "another id": document.dumps(comparison()).encode(),
            "too large": b'"' + b"x" * 40_000_000 + b'"',
            "nan": text.replace('"max_new_tokens":32', '"max_new_tokens":NaN').encode(),
        }.get(what, text.encode())
        hub.repos[KEY].files[f"comparisons/{id[:2]}/{id}.json"] = data
        if side:
            hub.repos[KEY].files[f"comparisons/{id[:2]}/{id}.meta.json"] = side
        with pytest.raises(UserError):
            saved.load(id)
        assert saved.count() == 0 and not list((tmp_path / "a" / "comparisons").iterdir()), (
            "it was kept all the same"
        )


def test_a_change_during_an_upload_goes_up_as_well(hub, tmp_path, monkeypatch):
    with machine(tmp_path / "a") as saved:
        id = saved.save(comparison())
        assert saved.remote.wait(20)
        hub.delay_s = 0.4
        saved.rename(id, "First")
        assert eventually(lambda: (tmp_path / "a" / "pending" / f"{id}.sending").exists()), "no upload began"
        saved.rename(id, "Second")
        hub.delay_s = 0.0
        assert saved.remote.wait(20)
        assert json.loads(hub.repos[KEY].files[f"comparisons/{id[:2]}/{id}.meta.json"])["name"] == "Second"


def test_through_the_environment_in_another_process(tmp_path):
    code = """
import sys
from comparator.store import open_store
from tests.sample import comparison
with open_store() as store:
    if len(sys.argv) > 1:
        print(store.load(sys.argv[1]).cells[0].text)
    else:
        id = store.save(comparison())
        assert store.remote.wait(30), store.status
        print(id)
"""
    with HubStandIn() as hub:

        def run(data: str, *args: str) -> str:
            env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "COMPARATOR_HUB_STORAGE": REPO}
            env["COMPARATOR_DATA_DIR"] = str(tmp_path / data)
            done = subprocess.run(
                [sys.executable, "-c", code, *args],
                capture_output=True,
                text=True,
                cwd=ROOT,
                env=env,
                timeout=120,
            )
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        id = run("one")
        assert run("two", id) == "The capital of France is Paris."


def test_a_mark_without_a_document_counts_for_nothing(hub, tmp_path):
    with machine(tmp_path / "a") as saved:
        saved.remote.mark(links.new_id())
        (tmp_path / "a" / "pending" / "notes.txt").write_text("")
        id = saved.save(comparison())
        assert saved.remote.wait(20) and saved.remote.status().pending == 0
        assert {p.rpartition("/")[2] for p in hub.repos[KEY].files} == {f"{id}.json", f"{id}.meta.json"}


# ---------------------------------------------------------------- settings and words


@pytest.mark.parametrize("repo", ["../x", "a/b/c", "http://x/y", "", " ", "a b/c"])
def test_what_is_no_repo_is_refused(tmp_path, repo):
    with pytest.raises(UserError, match="COMPARATOR_HUB_STORAGE"):
        open_remote(Settings(hub_storage=repo, data_dir=tmp_path), Folder(tmp_path))


def test_a_space_without_lasting_storage_says_so(tmp_path, monkeypatch):
    assert durability(tmp_path, None) == "", "one's own disk lasts"
    monkeypatch.setenv("SPACE_ID", "me/space")
    monkeypatch.setattr(hub_mirror, "_on_a_volume", lambda path: False)
    assert "stop working when this machine restarts" in durability(tmp_path, None)
    monkeypatch.setattr(hub_mirror, "_on_a_volume", lambda path: True)
    assert durability(tmp_path, None) == ""


def test_a_mounted_folder_is_a_volume():
    assert hub_mirror._on_a_volume(Path("/proc/self")) and not hub_mirror._on_a_volume(Path("/"))


def test_an_owners_key_does_not_go_to_the_hub(hub, tmp_path):
    with machine(tmp_path / "a", public=True) as saved:
        id = saved.save(comparison(), "the-visitors-own-key")
        assert saved.remote.wait(20)
        sidecar = saved.folder.read_sidecar(id)
    assert not any(b"the-visitors-own-key" in data for data in hub.repos[KEY].files.values())
    assert hub.repos[KEY].files[f"comparisons/{id[:2]}/{id}.meta.json"] == format_sidecar(sidecar)
