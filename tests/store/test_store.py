"""Saved comparisons: nothing finished is lost, nothing broken is left, and nobody sees what is not theirs."""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from store_helpers import asked, index_files, run_python

from comparator import store
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.result import CellResult, Environment, PromptInfo
from comparator.core.settings import Settings
from comparator.store import index as index_module
from comparator.store import links, open_store
from comparator.store.files import format_sidecar, parse_sidecar
from comparator.util import budget
from tests.sample import comparison

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


def test_one_visitor_cannot_keep_a_public_server_reading_large_documents(settings, monkeypatch):
    module = sys.modules[store.Store.__module__]
    whole, clock = comparison(), SimpleNamespace(s=1000.0)
    size = len(document.dumps(whole))
    monkeypatch.setattr(budget.time, "monotonic", lambda: clock.s)
    monkeypatch.setattr(module, "RECENT", 1)
    monkeypatch.setattr(module, "LARGE_BYTES", size // 2)
    monkeypatch.setattr(module, "LARGE_PER_MINUTE", 5 * size)
    with open_store(settings.model_copy(update={"public": True})) as saved:
        one, other, small = saved.save(whole), saved.save(whole), saved.save(asked("Hi"))
        with pytest.raises(UserError, match="opened too often"):
            for _ in range(4):
                saved.load(one)
                saved.load(other)
        assert saved.load(small).prompt.text == "Hi", "others wait for whoever opens large ones"
        clock.s += 61
        assert saved.load(one).id == one
    monkeypatch.setattr(module, "LARGE_PER_MINUTE", size)
    with open_store(settings) as saved:  # on a machine of one's own
        for _ in range(4):
            saved.load(one)
            saved.load(other)


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
    with pytest.raises(UserError, match="metadata file"):
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
