"""The store with many at once, and none of them polite: kills, forks, threads, a full disk."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
from store_helpers import asked, contents, index_files, run_python

from comparator.core import document
from comparator.store import links, open_store
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


def documents_in(data_dir: Path) -> int:
    return sum(not name.endswith(".meta.json") for name in os.listdir(data_dir / "comparisons"))


def test_killed_at_any_moment_it_loses_nothing_and_leaves_nothing_broken(settings):
    random_ = random.Random(11)
    on_progress: dict[str, str] = {}
    lines_seen = in_the_middle = 0
    for attempt in range(6):
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
    assert len(on_progress) >= 10 and lines_seen > 20, (
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
