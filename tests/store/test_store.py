"""Saved comparisons: nothing finished is lost, nothing broken is left, and nobody sees what is not theirs."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from comparator import store
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.result import CellResult, Environment, PromptInfo
from comparator.core.settings import Settings
from comparator.store import index as index_module
from comparator.store import links, open_store
from comparator.store.files import Folder, format_sidecar, parse_sidecar, summarize
from comparator.store.schema import VERSION
from tests.sample import comparison

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(data_dir=tmp_path / "data", public=False)


@pytest.fixture
def public(settings) -> Settings:
    return settings.model_copy(update={"public": True})


def asked(prompt: str, *variants: str, **changes):
    """A comparison of a prompt; the rest is small, since a history needs no figures."""
    cells = tuple(CellResult(v, text="An answer.") for v in variants or ("bf16", "nf4"))
    return comparison(prompt=PromptInfo(prompt), cells=cells, **changes)


def run_python(code: str, *args: str, **env: str) -> subprocess.Popen:
    """Another process of this project, talking through its standard output."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )


def index_files(data_dir: Path) -> list[Path]:
    return sorted(data_dir.glob("index-*.sqlite3"))


# ---------------------------------------------------------------- documents


def test_what_is_saved_comes_back_equal_under_its_new_id(settings):
    whole = comparison()
    with open_store(settings) as saved:
        id = saved.save(whole)
        assert links.check_id(id) == id and id != whole.id
        assert saved.load(id) == replace(whole, id=id)
    with open_store(settings) as again:
        assert again.load(id) == replace(whole, id=id), "not there after a restart"
        assert [e.id for e in again.search()] == [id]


def test_a_document_is_plain_json_named_by_its_id_and_never_written_again(settings):
    with open_store(settings) as saved:
        id = saved.save(comparison())
        path = settings.data_dir / "comparisons" / f"{id}.json"
        before = (path.read_bytes(), path.stat().st_ino)
        assert document.loads(before[0]).id == id
        saved.rename(id, "Another name")
        saved.delete(id)
        saved.undelete(id)
        assert (path.read_bytes(), path.stat().st_ino) == before, "a document is immutable"


def test_opening_needs_no_torch_no_index_and_no_hub(settings):
    with open_store(settings) as saved:
        id = saved.save(comparison())
    for path in index_files(settings.data_dir):
        path.unlink()
    code = """
import sys
for name in ("torch", "transformers", "bitsandbytes", "gradio", "huggingface_hub"):
    sys.modules[name] = None          # importing it raises
from comparator.store import open_store
print(open_store().load(sys.argv[1]).cells[0].text)
"""
    out, err = run_python(code, id, COMPARATOR_DATA_DIR=str(settings.data_dir)).communicate(timeout=60)
    assert out.strip() == "The capital of France is Paris.", err


@pytest.mark.parametrize(
    "id",
    [
        "", ".", "..", "../../secret", "/etc/passwd", "..%2f..%2fsecret", "..\\..\\secret", "a" * 22 + "/..", "*" * 22,
        "AAAAAAAAAAAAAAAAAAAA\0A", "'; DROP TABLE comparisons; --", "con", "A" * 5000, "AAAAAAAAAAAAAAAAAA.meta",
    ],
)  # fmt: skip
def test_ids_with_tricks_reach_no_file(settings, id):
    (settings.data_dir.parent / "secret.json").write_text(document.dumps(comparison()))
    with open_store(settings) as saved:
        for action in (
            saved.load, saved.entry, saved.delete, saved.undelete, saved.same_prompt, lambda i: saved.rename(i, "x"),
        ):  # fmt: skip
            with pytest.raises(store.BadId):
                action(id)


def test_unknown_malformed_deleted_and_damaged_are_told_apart(settings):
    with open_store(settings) as saved:
        gone, hurt, copied = (saved.save(comparison()) for _ in range(3))
        saved.delete(gone)
        saved.folder.document_path(hurt).write_text("{")
        other = links.new_id()
        shutil.copy(saved.folder.document_path(copied), saved.folder.document_path(other))
        kinds = {}
        for name, id in {
            "bad": "../x",
            "unknown": links.new_id(),
            "deleted": gone,
            "hurt": hurt,
            "copy": other,
        }.items():
            with pytest.raises(UserError) as caught:
                saved.load(id)
            kinds[name] = caught.value
            assert caught.value.advice, f"no way on from {name}"
        assert isinstance(kinds["bad"], store.BadId)
        assert isinstance(kinds["unknown"], store.NotFound)
        assert isinstance(kinds["deleted"], store.Deleted)
        assert "damaged" in kinds["hurt"].problem
        assert isinstance(kinds["copy"], store.NotFound), "a file under another id is not that comparison"
        assert len({p.problem for p in kinds.values()}) == 4


def test_opening_again_is_quick_and_still_notices_deletion_and_damage(settings, monkeypatch):
    with open_store(settings) as saved:
        ids = [saved.save(comparison(), "me") for _ in range(20)]
        read = []
        monkeypatch.setattr(
            document, "loads", lambda *a, loads=document.loads, **k: read.append(1) or loads(*a, **k)
        )
        for _ in range(5):
            assert saved.load(ids[-1]).id == ids[-1]
        assert not read, "a document that was just saved is parsed again for every visitor"
        for id in ids:
            assert saved.load(id).id == id
        assert len(saved._recent) < len(ids), "every document that was ever opened stays in memory"
        saved.delete(ids[-1])
        with pytest.raises(store.Deleted):
            saved.load(ids[-1])
        saved.folder.document_path(ids[-2]).write_text("{")
        with pytest.raises(UserError, match="damaged"):
            saved.load(ids[-2])
        saved.folder.document_path(ids[-3]).unlink()
        with pytest.raises(store.NotFound):
            saved.load(ids[-3])


def test_what_could_not_be_opened_again_is_not_saved(settings):
    broken = comparison(cells=(CellResult("nf4", token_ids=("not a number",)),))
    with open_store(settings) as saved:
        with pytest.raises(UserError):
            saved.save(broken)
        assert saved.count() == 0 and not list((settings.data_dir / "comparisons").iterdir())


# ---------------------------------------------------------------- names, deletion, history


def test_name_delete_undo_and_search(settings):
    with open_store(settings) as saved:
        paris = saved.save(asked("What is the capital of France?", "bf16", "nf4:dq"))
        rain = saved.save(asked("Write about rain.", "int8", model="Qwen/Qwen3-4B"))
        assert [e.id for e in saved.search()] == [rain, paris], "newest first"
        assert [e.id for e in saved.search("FRANCE nf4:dq")] == [paris]
        assert [e.id for e in saved.search("qwen")] == [rain]
        assert [e.id for e in saved.search("apital")] == [paris], "a part of a word is found too"
        assert [e.id for e in saved.search(paris)] == [paris], "an id that was pasted"
        assert saved.search("france rain") == [], "every word has to be there"
        saved.rename(rain, "  Monsoon \n study ")
        assert saved.entry(rain).name == "Monsoon study"
        assert [e.id for e in saved.search("monsoon")] == [rain]
        saved.delete(rain)
        assert [e.id for e in saved.search()] == [paris] and saved.count() == 1
        assert [e.id for e in saved.search(deleted=True)] == [rain]
        saved.undelete(rain)
        assert saved.search("monsoon")[0].deleted_at is None
        assert saved.load(rain).prompt.text == "Write about rain."
        with pytest.raises(UserError, match="201 characters"):
            saved.rename(rain, "x" * 201)
        assert saved.entry(rain).name == "Monsoon study"


def test_an_entry_says_what_a_list_shows(settings):
    with open_store(settings) as saved:
        id = saved.save(comparison(), "me", name="Mine")
        entry = saved.search()[0]
        assert entry == saved.entry(id)
        assert entry.variants == ("bf16", "nf4", "nf4 + pirate*0.5", "int8:threshold=0")
        assert (entry.model, entry.name, entry.device) == ("smollm2-135m", "Mine", "CPU (2 cores)")
        assert entry.created_at == "2026-01-31T12:00:00+00:00" and entry.saved_at > "2026"
        assert entry.imported is False


def test_the_same_prompt_elsewhere_is_found(settings):
    with open_store(settings) as saved:
        here = saved.save(asked("Hello"))
        there = saved.save(
            asked("Hello", "gptq", environment=Environment(device="NVIDIA H100"), model="other/model")
        )
        saved.save(asked("Hello "))
        saved.save(comparison(prompt=PromptInfo("Hello", "Be brief.")))
        assert [e.id for e in saved.same_prompt(here)] == [there]
        assert saved.same_prompt(here)[0].device == "NVIDIA H100"


def test_a_search_finds_what_a_plain_loop_finds(settings):
    random_ = random.Random(5)
    words = ["France", "größe", "東京", "rain%", "under_score", "İstanbul", "nf4", "a'b", '"quoted"', "ﬁne"]
    with open_store(settings) as saved:
        kept = {}
        for _ in range(150):
            text = " ".join(random_.choices(words, k=4))
            kept[saved.save(asked(text, random_.choice(["bf16", "int8"])))] = text
        for query in [
            *words,
            "FRANCE rain%",
            "GRÖSSE",
            "größe nf4",
            "%",
            "_",
            "fine",
            "int8 東京",
            "京",
            "nothing",
        ]:
            found = {e.id for e in saved.search(query, limit=500)}
            expected = {
                e.id
                for e in saved.search(limit=500)
                if all(
                    t
                    in index_module.fold(
                        "\n".join([e.model, *e.variants, e.device, e.created_at[:10], e.id, kept[e.id]])
                    )
                    for t in index_module.fold(query).split()
                )
            }
            assert found == expected, f"searching for {query}"
            assert saved.count(query) == len(found)
        pages = [e.id for start in range(0, 150, 40) for e in saved.search(limit=40, offset=start)]
        assert pages == [e.id for e in saved.search(limit=500)], "pages overlap or leave something out"


@pytest.mark.parametrize(
    "query",
    [
        "'", '"', "' OR 1=1 --", "x'; DROP TABLE comparisons; --", "*", "%", "h_llo", "\\", "NEAR(a b)", "a AND", "\0", "\ud800",
        "~ " * 100_000, "x" * 1_000_000, "{}", "?1", ":id", "<script>alert(1)</script>",
    ],
)  # fmt: skip
def test_nothing_in_a_search_is_sql(settings, query):
    with open_store(settings) as saved:
        saved.save(asked("Hello"))
        start_s = time.process_time()
        assert saved.search(query) == []
        assert time.process_time() - start_s < 2
        assert saved.count() == 1, "the search changed something"


@pytest.mark.parametrize(("limit", "offset"), [(-1, 0), (10**30, 0), (5, -7), (5, 10**30), (0, 0)])
def test_pages_out_of_range_are_cut_to_it(settings, limit, offset):
    with open_store(settings) as saved:
        saved.save(asked("Hello"))
        assert len(saved.search(limit=limit, offset=offset)) <= 1


# ---------------------------------------------------------------- whose it is


def test_in_public_nobody_sees_or_changes_what_is_another_visitors(public):
    with open_store(public) as saved:
        mine, yours = saved.save(asked("My secret"), "me"), saved.save(asked("Your secret"), "you")
        nobodys = saved.save(asked("Nobody's"))
        assert [e.id for e in saved.search(owner="me")] == [mine]
        assert [e.id for e in saved.search("secret", "you")] == [yours]
        assert saved.search("secret") == [] and saved.count() == 0, (
            "a visitor without a key sees somebody's history"
        )
        assert saved.search(owner="") == [] and saved.search(owner="%") == []
        assert [e.id for e in saved.same_prompt(mine, "you")] == []
        for id, owner in ((mine, "you"), (mine, None), (mine, ""), (nobodys, None), (nobodys, "me")):
            for action in (saved.delete, saved.undelete, lambda i, o: saved.rename(i, "mine now", o)):
                with pytest.raises(store.NotYours):
                    action(id, owner)
        assert saved.load(mine).prompt.text == "My secret", "a link opens for anyone who has it"
        saved.rename(mine, "ok", "me")
        saved.delete(mine, "me")
        assert [e.id for e in saved.search(owner="me", deleted=True)] == [mine]
        assert saved.search(owner="you", deleted=True) == []
        saved.undelete(mine, "me")


def test_on_ones_own_machine_everything_is_ones_own(settings):
    with open_store(settings) as saved:
        ids = {
            saved.save(asked("A"), "one browser"),
            saved.save(asked("B"), "another"),
            saved.save(asked("C")),
        }
        assert {e.id for e in saved.search()} == ids
        for id in ids:
            saved.delete(id, "a third")
        assert saved.count() == 0


def test_an_owners_key_is_never_kept(public):
    with open_store(public) as saved:
        saved.save(asked("Hello"), "the-visitors-own-key")
    for path in public.data_dir.rglob("*"):
        if path.is_file():
            assert b"the-visitors-own-key" not in path.read_bytes(), (
                f"whoever reads {path.name} can pose as the owner"
            )


# ---------------------------------------------------------------- what comes from outside


def test_an_imported_document_gets_a_new_id_and_says_that_it_was_imported(settings):
    with open_store(settings) as saved:
        first = saved.save(comparison())
        data = saved.folder.document_path(first).read_bytes()
        path = settings.data_dir.parent / "sent.json"
        path.write_bytes(data)
        second = saved.import_file(path, "me")
        assert second != first
        assert saved.load(second) == replace(saved.load(first), id=second)
        assert saved.entry(second).imported and not saved.entry(first).imported
        assert saved.import_file(path) not in (first, second)


def test_a_file_too_large_is_refused_without_reading_it_all(tmp_path):
    settings = Settings(data_dir=tmp_path / "data", public=False, max_upload="1MB")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(100_000_000_000)  # a sparse file: nobody has the memory for it
    with open_store(settings) as saved:
        with pytest.raises(UserError, match="MB"):
            saved.import_file(huge)
        assert saved.count() == 0


# ---------------------------------------------------------------- the index is only an index


def contents(saved) -> list:
    return saved.search(limit=500) + saved.search(limit=500, deleted=True)


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


# ---------------------------------------------------------------- many at once, and none of them polite

SAVING = """
import sys, random
sys.path.insert(0, ".")
from comparator.core.settings import Settings
from comparator.store import open_store
from comparator.types import CellResult, PromptInfo
from tests.sample import PACKED, comparison
store = open_store(Settings(data_dir=sys.argv[1], public=False))
many = tuple(CellResult("nf4", text="x" * 50, layers=(PACKED,) * 60) for _ in range(3))
for number in range(int(sys.argv[2])):
    id = store.save(comparison(prompt=PromptInfo(f"prompt {number}"), cells=many), "me")
    print("saved", id, flush=True)
    if number % 3 == 1:
        store.rename(id, f"name {number}")
        print("named", id, f"name {number}", flush=True)
    if number % 3 == 2:
        store.delete(id)
        print("deleted", id, flush=True)
"""


def documents_in(data_dir: Path) -> int:
    return sum(not name.endswith(".meta.json") for name in os.listdir(data_dir / "comparisons"))


def test_killed_at_any_moment_it_loses_nothing_and_leaves_nothing_broken(settings):
    random_ = random.Random(11)
    on_progress: dict[str, str] = {}
    lines_seen = in_the_middle = 0
    for attempt in range(9):
        process = run_python(SAVING, settings.data_dir, "100000")
        lines: list[str] = []
        reader = threading.Thread(target=lambda p=process, to=lines: to.extend(p.stdout), daemon=True)
        reader.start()
        end_s = time.monotonic() + 30
        enough = random_.randint(1, 12)
        while len(lines) < enough and time.monotonic() < end_s and process.poll() is None:
            time.sleep(0.005)
        if attempt % 3 == 0:  # at any moment
            time.sleep(random_.uniform(0, 0.06))
        elif attempt % 3 == 1:  # while a file is being written
            while not os.listdir(settings.data_dir / "tmp") and time.monotonic() < end_s:
                pass
        else:  # when a document has just appeared
            there = documents_in(settings.data_dir)
            while documents_in(settings.data_dir) == there and time.monotonic() < end_s:
                pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        in_the_middle += any((settings.data_dir / "tmp").iterdir())
        reader.join(timeout=10)
        assert lines, process.stderr.read()
        lines_seen += len(lines)
        for line in lines:
            if line.endswith("\n"):
                word, id, *rest = line.split()
                on_progress[id] = word + " " + " ".join(rest) if rest else word
        with open_store(settings) as saved:
            for path in (settings.data_dir / "comparisons").iterdir():
                if path.name.endswith(".meta.json"):
                    parse_sidecar(path.read_bytes())
                else:
                    assert path.name.endswith(".json"), f"{path.name} was left behind"
                    document.loads(path.read_bytes())  # whole, whatever was killed
            assert not list((settings.data_dir / "tmp").iterdir()), (
                "the killed process's temporary file is still there"
            )
            listed = {e.id: e for e in contents(saved)}
            for id, state in on_progress.items():
                assert id in listed, f"{id} was saved ({state}) and is not in the history"
                if state == "deleted":
                    assert listed[id].deleted_at, "a deletion was lost"
                elif not listed[id].deleted_at:  # killed after deleting it and before saying so
                    assert saved.load(id).id == id
                if state.startswith("named"):
                    assert listed[id].name == state.removeprefix("named "), "a name was lost"
    assert len(on_progress) >= 16 and lines_seen > 30, (
        "the processes hardly got to save anything: the test shows nothing"
    )
    assert in_the_middle, "no process was killed while it wrote: the test shows nothing of that"


@pytest.mark.parametrize("step", range(7))
def test_killed_at_each_step_of_a_save(settings, step):
    """A save is: sidecar to the disk, renamed, folder to the disk; document likewise; then the index."""
    with open_store(settings) as saved:
        first = saved.save(asked("First"))
    code = """
import os, signal, sys
from comparator.core.settings import Settings
from comparator.store import open_store
from tests.sample import comparison
store = open_store(Settings(data_dir=sys.argv[1], public=False))
left = int(sys.argv[2])
def dying(real):
    def call(*args, **kwargs):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return real(*args, **kwargs)
    return call
os.fsync, os.replace, store._index.put = map(dying, (os.fsync, os.replace, store._index.put))
store.save(comparison())
print("survived")
"""
    process = run_python(code, settings.data_dir, str(step))
    out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, f"a save has fewer steps than it should: {out}{err}"
    renamed = step >= 5  # the document's rename is the moment from which it is saved
    assert bool(list((settings.data_dir / "tmp").iterdir())) == (step in (0, 1, 3, 4))
    with open_store(settings) as saved:
        assert saved.count() == 1 + renamed, "half a save is in the history, or a whole one is not"
        assert saved.load(first).prompt.text == "First"
        for entry in saved.search():
            assert saved.load(entry.id).id == entry.id
        assert not list((settings.data_dir / "tmp").iterdir())


def test_several_processes_share_one_folder(settings):
    processes = [run_python(SAVING, settings.data_dir, "9") for _ in range(3)]
    outs = [p.communicate(timeout=120) for p in processes]
    assert all(p.returncode == 0 for p in processes), outs
    saved_ids = {line.split()[1] for out, _ in outs for line in out.splitlines() if line.startswith("saved")}
    with open_store(settings) as saved:
        assert len(saved_ids) == 27
        assert {e.id for e in contents(saved)} == saved_ids
        assert saved.count(deleted=True) == 9 and len([e for e in saved.search(limit=500) if e.name]) == 9
    assert len(index_files(settings.data_dir)) == 1


def test_threads_change_different_things_of_one_comparison_without_losing_either(settings):
    with open_store(settings) as saved, open_store(settings) as other:
        id = saved.save(asked("Hello"))
        errors: list[BaseException] = []

        def do(action) -> None:
            try:
                for _ in range(10):
                    action()
            except BaseException as error:
                errors.append(error)

        threads = [
            threading.Thread(target=do, args=(action,))
            for action in (
                lambda: saved.rename(id, "Named"),
                lambda: other.delete(id),
                lambda: saved.search("named"),
                lambda: other.save(asked("Meanwhile")),
            )
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert not errors
        entry = saved.entry(id)
        assert entry.name == "Named" and entry.deleted_at, "one change overwrote the other"
        assert saved.count() == 10


def test_after_a_fork_parent_and_child_both_go_on(settings):
    with open_store(settings) as saved:
        first = saved.save(asked("Before"))
        child = os.fork()
        if child == 0:  # no pytest in here
            ok = [e.id for e in saved.search()] == [first] and bool(saved.save(asked("From the child")))
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert saved.search("from the child") and saved.save(asked("After"))
        assert saved.count() == 3


def test_a_full_disk_is_told_and_leaves_nothing_half_written(settings):
    with open_store(settings) as saved:
        kept = saved.save(asked("Before the disk was full"))
    code = """
import resource, signal, sys
from comparator.core.settings import Settings
from comparator.store import open_store
from comparator.types import CellResult, UserError
from tests.sample import PACKED, comparison
store = open_store(Settings(data_dir=sys.argv[1], public=False))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))   # the kernel refuses larger files, as a full disk does
try:
    store.save(comparison(cells=(CellResult("nf4", layers=(PACKED,) * 900),)))
except UserError as problem:
    print(problem)
"""
    out, err = run_python(code, settings.data_dir).communicate(timeout=60)
    assert "disk is full" in out and "COMPARATOR_DATA_DIR" in out, err
    with open_store(settings) as saved:
        assert [e.id for e in saved.search()] == [kept]
        assert not list((settings.data_dir / "tmp").iterdir())


def test_leftovers_of_living_processes_are_let_alone(settings):
    folder = Folder(settings.data_dir)
    folder.create()
    from comparator.store.files import _this_machine

    mine = folder.tmp / f"{_this_machine()}~{os.getpid()}~aa.part"
    others = folder.tmp / "another-machine~1~bb.part"
    old = folder.tmp / "another-machine~1~cc.part"
    for path in (mine, others, old):
        path.write_text("half")
    os.utime(old, (time.time() - 7200,) * 2)
    folder.create()
    assert mine.exists() and others.exists() and not old.exists()


def test_a_sidecar_whose_document_never_came_goes_after_an_hour(settings):
    with open_store(settings) as saved:
        id = saved.save(asked("Hello"))
        fresh, old = (saved.folder.sidecar_path(links.new_id()) for _ in range(2))
        for path in (fresh, old):
            shutil.copy(saved.folder.sidecar_path(id), path)
        os.utime(old, (time.time() - 7200,) * 2)
    with open_store(settings) as saved:
        assert [e.id for e in saved.search()] == [id]
    assert fresh.exists(), "another process may be saving that document right now"
    assert not old.exists() and saved.folder.sidecar_path(id).exists()


# ---------------------------------------------------------------- sidecars


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "null", "{", '{"owner": 7, "saved_at": "x"}', '{"saved_at": null}', "{}", '{"saved_at": "x", "name": []}',
        '{"saved_at": "x", "summary": {"variants": [1]}}', '{"saved_at": "x", "summary": []}', "[" * 100_000,
        '{"saved_at": "x", "imported": "yes"}', '{"saved_at": "x", "name": "' + "x" * 70_000 + '"}',
    ],
)  # fmt: skip
def test_a_hostile_sidecar_is_refused(text):
    with pytest.raises(UserError, match="side file"):
        parse_sidecar(text.encode())


def test_a_sidecar_survives_its_file_and_newer_fields(settings):
    with open_store(settings) as saved:
        sidecar = saved.folder.read_sidecar(saved.save(comparison(), "me", name="Ünïcode \ud800"))
    assert parse_sidecar(format_sidecar(sidecar)) == sidecar
    newer = json.loads(format_sidecar(sidecar)) | {"starred": True}
    assert parse_sidecar(json.dumps(newer).encode()) == sidecar


@pytest.mark.skipif(os.name != "posix", reason="modes are those of POSIX")
def test_what_is_saved_is_readable_by_its_owner_alone(settings):
    old = os.umask(0o022)
    try:
        with open_store(settings) as saved:
            saved.save(comparison())
            saved.count()
    finally:
        os.umask(old)
    modes = {p: p.stat().st_mode & 0o777 for p in [settings.data_dir, *settings.data_dir.rglob("*")]}
    assert not {str(p): oct(m) for p, m in modes.items() if p.is_dir() and m != 0o700}
    assert not {str(p): oct(m) for p, m in modes.items() if p.suffix == ".json" and m != 0o600}


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_sidecar_does_not_block_its_document(settings, damage):
    with open_store(settings) as saved:
        id = saved.save(comparison(), name="before")
        saved.folder.sidecar_path(id).write_bytes(damage)
    with open_store(settings) as saved:
        assert saved.load(id).id == id and saved.entry(id).name == ""
        assert [e.id for e in saved.search()] == [id], "the history lost it"
        saved.rename(id, "after")
        assert saved.entry(id).name == "after"


def test_a_clock_that_went_back_does_not_keep_an_old_index(settings, monkeypatch):
    with open_store(settings) as saved:
        saved.save(comparison())
        saved.count()
        old = saved._index._path
        monkeypatch.setattr(index_module.time, "time_ns", lambda: 1_000_000_000)
        saved._index._begin_anew = True
        assert saved.count() == 1
        assert saved._index._path.name > old.name, "other processes would keep the older index"
