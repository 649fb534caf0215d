"""The store with many at once, and none of them polite: kills, forks, threads, a full disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
import traceback

import pytest
from store_helpers import asked, contents, index_files, run_python

from comparator.store import NotFound, links, open_store
from comparator.store.files import Folder, parse_sidecar

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


def busy(settings, known: dict[str, str], seed: int, say) -> None:
    """Save, name, delete and remove for good without end; `say` gets what is about to be done and what is done."""
    random_ = random.Random(seed)
    states = dict(known)
    with open_store(settings) as saved:
        while True:
            number = random_.randrange(10**6)
            what = random_.choice(["save", "save", "name", "delete", "purge"])
            with_it = sorted(id for id, state in states.items() if (state == "deleted") == (what == "purge"))
            if what == "save" or not with_it:
                say("begin save - -")
                id, state = saved.save(asked(f"prompt {number}")), "saved"
            else:
                id = random_.choice(with_it)
                say(f"begin {what} {id} {number}")
                if what == "name":
                    saved.rename(id, f"{number}")
                    state = f"{number}"
                else:
                    saved.delete(id) if what == "delete" else saved.purge(id)
                    state = {"delete": "deleted", "purge": "purged"}[what]
            states[id] = state
            if state == "purged":
                del states[id]
            say(f"done {what} {id} {state}")


def killed_while_busy(settings, known: dict[str, str], seed: int, after_s: float) -> list[str]:
    """What a process said until it was killed, some time after its first word."""
    ours, its = os.pipe()
    child = os.fork()
    if child == 0:  # no pytest in here
        try:
            busy(settings, known, seed, lambda text: os.write(its, (text + "\n").encode()))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(its)
    with os.fdopen(ours, encoding="utf-8") as said:
        first = said.readline()
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it failed by itself"
        return [first, *said]


def state_of(saved, id: str) -> str:
    try:
        entry = saved.entry(id)
    except NotFound:
        return "purged"
    if entry.deleted_at:
        return "deleted"
    assert saved.load(id).id == id
    return entry.name or "saved"


@pytest.mark.parametrize("times", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_at_any_moment_it_loses_nothing_and_leaves_nothing_broken(settings, times):
    """kill -9, again and again, on one data folder: what a process had confirmed is there, and nothing is half there."""
    random_ = random.Random(11)
    known: dict[str, str] = {}  # id → what was last confirmed
    in_the_middle = 0
    for seed in range(times):
        lines = killed_while_busy(settings, known, seed, random_.uniform(0, 0.08))
        open_ = None  # what had begun and was not confirmed
        for line in lines:
            word, what, id, rest = line.split()
            open_ = (what, id, rest) if word == "begin" else None
            if word == "done":
                known[id] = rest
        in_the_middle += open_ is not None
        with open_store(settings) as saved:
            for path in (settings.data_dir / "comparisons").iterdir():
                if path.name.endswith(".meta.json"):
                    parse_sidecar(path.read_bytes())
                else:
                    assert path.name.endswith(".json"), f"{path.name} was left behind"
            assert not list((settings.data_dir / "tmp").glob("*")), "a temporary file is still there"
            if open_ and open_[0] != "save":
                what, id, rest = open_
                outcome = state_of(saved, id)
                possible = {"name": rest, "delete": "deleted", "purge": "purged"}[what]
                assert outcome in (known[id], possible), f"cut off in {what}, it is {outcome}: {known[id]}"
                known[id] = outcome
            for id, state in known.items():
                assert state_of(saved, id) == state, f"killed {seed + 1} times, {id} is no longer {state}"
            extra = {e.id for e in contents(saved)} - known.keys()
            assert len(extra) <= bool(open_ and open_[0] == "save"), "the history has what nobody saved"
            known |= dict.fromkeys(extra, "saved")
            listed = {e.id for e in contents(saved)}
            assert listed == {id for id, state in known.items() if state != "purged"}
            for id in [id for id, state in known.items() if state == "purged"]:
                del known[id]
            for id in sorted(known)[30:]:  # so that a thousand rounds do not make thousands of files
                saved.purge(id, lambda sidecar: True)
                del known[id]
    assert in_the_middle > times / 4, "hardly any process was killed at work: the test shows nothing"


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
