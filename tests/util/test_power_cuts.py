"""Power cuts and refusals of the disk at every step of everything that must last: it is as before or as after, whole.

What was confirmed is there; what was refused can be tried again.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from fault_layer import failing, power_cuts
from store_helpers import asked

from comparator.backends import calibration
from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.reporting import export
from comparator.store import backup, open_store
from comparator.training import artifact, run_store
from comparator.training.tokenize import Corpus, Encoded
from comparator.training.types import DataSource, Evaluation, TrainRequest
from comparator.util import atomic_dir

ROOT = Path(__file__).resolve().parents[2]
MEMORY = Path("/dev/shm")  # real files on a disk whose flushes cost nothing
KINDS = {"adapters": artifact.FILES, "trainings": run_store.RECORDS}
SAMPLE = Encoded(0, (1, 2, 3), (-100, 2, 3), 3)
ABOUT = artifact.About("run", "run", TrainRequest(DataSource("pirate")), "pirate", "00", 1, 0)


@pytest.fixture
def tmp_path(tmp_path):
    """In memory where the system has such a folder: a thousand flushes of a busy disk take a minute."""
    if not MEMORY.is_dir():
        return (yield tmp_path)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Case:
    """`act` changes what `look` returns; all below the folder that they get. `prepare` comes first, undisturbed."""

    act: Callable[[Path], object]
    look: Callable[[Path], object]
    prepare: Callable[[Path], object] = lambda root: None


# ---------------------------------------------------------------- saved comparisons


def opened(root: Path, **changes):
    return open_store(Settings(data_dir=root / "data", public=False, **changes))


def history(root: Path) -> set[tuple[str, str, bool]]:
    """What is listed: prompt, name, deleted or not. Each opens, unless it is deleted, and is listed with a new index too."""
    with opened(root) as saved:
        entries = saved.search(limit=500)
        for entry in entries:
            assert saved.load(entry.id).prompt.text == entry.prompt
        deleted = saved.search(limit=500, deleted=True)
        saved.reindex()
        assert (entries, deleted) == (saved.search(limit=500), saved.search(limit=500, deleted=True))
        left = [p.name for p in (root / "data" / "comparisons").iterdir() if p.name.startswith(".")]
        assert not left, f"{left} will never be removed"
    return {(e.prompt, e.name, e.deleted_at is not None) for e in (*entries, *deleted)}


def two_saved(root: Path) -> None:
    with opened(root) as saved:
        saved.save(asked("First"), name="one")
        saved.delete(saved.save(asked("Second")))


def change(method: str, prompt: str, *values: object, **changes) -> Callable[[Path], None]:
    def act(root: Path) -> None:
        with opened(root, **changes) as saved:
            entries = (*saved.search(), *saved.search(deleted=True))
            for id in [e.id for e in entries if e.prompt == prompt]:
                getattr(saved, method)(id, *values)

    return act


def save(root: Path) -> None:
    with opened(root) as saved:
        saved.save(asked("Third"), name="three")


def write_backup(root: Path) -> None:
    with opened(root) as saved:
        backup.write(saved, KINDS, root / "all.tar.gz")


def purged_after_a_backup(root: Path) -> None:
    two_saved(root)
    trained(root)
    write_backup(root)
    change("purge", "Second")(root)
    shutil.rmtree(root / "data" / "adapters")


def restore(root: Path) -> None:
    with opened(root) as saved:
        report = backup.restore(saved, KINDS, root / "all.tar.gz")
    if report.refused:
        raise UserError(*report.refused[0])  # the command ends with an error too


def restored(root: Path) -> object:
    """A mark of a removal would have the restored comparison removed again a day later."""
    found = history(root)
    return found, {p.name for p in (root / "data").glob("purged/*")} if len(found) == 2 else set()


# ---------------------------------------------------------------- trainings, caches, reports


def files(folder: Path) -> dict[str, bytes]:
    """Every file that a reader would take for whole, by its path; what begins with a dot is nobody's."""
    paths = (p for p in folder.rglob("*") if p.is_file())
    found = {str(p.relative_to(folder)): p.read_bytes() for p in paths}
    return {name: content for name, content in found.items() if not re.search(r"(^|/)\.", name)}


def begin_run(root: Path) -> None:
    work = root / "data" / "trainings"
    run_store.new(work, ABOUT, root / "data" / "adapters" / "run", Corpus((SAMPLE,), (), (), ())).close()


def runs(root: Path) -> list[object]:
    """Each run on disk can be read; its checkpoint, if it has one, is whole."""
    work = root / "data" / "trainings"
    found = []
    for name in run_store.names(work):
        state = run_store.interrupted(work, name)
        if state.checkpoint_step:
            run = run_store.reopen(work, name)
            run.close()
            assert run.train == (SAMPLE,)
            assert (run.checkpoint[0] / "weights").read_bytes() == b"w" * 5000, "a checkpoint is not whole"
        found.append((name, state.checkpoint_step))
    return found


def checkpoint(root: Path) -> None:
    output = root / "data" / "trainings" / "run" / "checkpoints"
    trainer = SimpleNamespace(
        state=SimpleNamespace(global_step=5), args=SimpleNamespace(output_dir=str(output))
    )
    watch = SimpleNamespace(saving=lambda step: None, state_dict=dict, notes=[])

    def save() -> None:
        (output / "checkpoint-5").mkdir(parents=True, exist_ok=True)
        (output / "checkpoint-5" / "weights").write_bytes(b"w" * 5000)

    artifact.checkpointed(save, trainer, watch)
    if watch.notes:
        raise UserError(watch.notes[0])  # what a refused step ends as


def trained(root: Path) -> None:
    folder = root / "data" / "adapters" / "mine"
    folder.mkdir(parents=True)
    result = {"name": "mine", "notes": ["n" * 9000]}
    (folder / "training.json").write_text(json.dumps({"result": result}))


def evaluated(root: Path) -> object:
    record = json.loads((root / "data" / "adapters" / "mine" / "training.json").read_text())
    return record["result"].get("evaluation")


def evaluate(root: Path) -> None:
    artifact.remember_evaluation(root / "data" / "adapters" / "mine", Evaluation("2026", "nf4", ()))


def build(root: Path) -> None:
    with atomic_dir.building(root / "cache" / "models" / "tiny") as folder:
        if folder is not None:
            (folder / "sub").mkdir(exist_ok=True)
            (folder / "sub" / "weights").write_bytes(b"w" * 5000)


CASES = {
    "the first save": Case(save, history),
    "a save": Case(save, history, two_saved),
    "a name": Case(change("rename", "First", "another"), history, two_saved),
    "a deletion": Case(change("delete", "First"), history, two_saved),
    "an undone deletion": Case(change("undelete", "Second"), history, two_saved),
    "a removal for good": Case(change("purge", "Second"), history, two_saved),
    "a backup": Case(write_backup, lambda root: (root / "all.tar.gz").exists() and restorable(root), two_saved),
    "a restored comparison": Case(restore, restored, purged_after_a_backup),
    "a restored adapter": Case(restore, lambda root: files(root / "data" / "adapters"), purged_after_a_backup),
    "a new training": Case(begin_run, runs),
    "a checkpoint": Case(checkpoint, runs, begin_run),
    "a discarded training": Case(lambda root: run_store.remove(root / "data" / "trainings", "run"), runs, begin_run),
    "an evaluation": Case(evaluate, evaluated, trained),
    "a folder of the cache": Case(build, lambda root: files(root / "cache")),
    "a removed folder of the cache": Case(
        lambda root: atomic_dir.remove(root / "cache" / "models" / "tiny"), lambda root: files(root / "cache"), build
    ),
    "a calibration text": Case(
        lambda root: calibration.store(["A text. " * 50], root / "cache"), lambda root: files(root / "cache")
    ),
    "a report": Case(
        lambda root: export.write_text(root / "report.md", "new" * 3000),
        lambda root: (root / "report.md").read_text(),
        lambda root: export.write_text(root / "report.md", "old" * 3000),
    ),
}  # fmt: skip


def restorable(root: Path) -> set:
    other = root.parent / f"{root.name}-restored"
    with open_store(Settings(data_dir=other / "data", public=False)) as saved:
        backup.restore(saved, KINDS, root / "all.tar.gz")
    found = history(other)
    shutil.rmtree(other)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_power_cut_at_any_step(name, tmp_path):
    case, root = CASES[name], tmp_path / "root"
    root.mkdir()
    case.prepare(root)
    shutil.copytree(root, tmp_path / "unchanged")
    before = case.look(tmp_path / "unchanged")
    with power_cuts(root) as cuts:
        case.act(root)
    after = case.look(root)
    assert before != after and len(cuts) > 3, "nothing was done: this test shows nothing"
    for number, cut in enumerate(cuts):
        there = tmp_path / f"cut-{number}"
        cut.lay_out(there)
        where = f"after {cut.step} ({number} of {len(cuts)}, {cut.way})"
        try:
            state = case.look(there)
        except Exception as error:
            error.add_note(f"with the power gone {where}")
            raise
        if cut.last:
            assert state == after, f"{name} was confirmed, and is lost with the power gone {where}"
        else:
            assert state in (before, after), f"{name} is half done with the power gone {where}"
        shutil.rmtree(there)


@pytest.mark.parametrize("name", CASES)
def test_a_disk_that_refuses_at_any_step(name, tmp_path):
    case = CASES[name]
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    case.prepare(prepared)
    before = case.look(prepared)
    for at in range(1, 200):
        root = tmp_path / f"step-{at}"
        shutil.copytree(prepared, root)
        refused = False
        with failing(root, at, errno.ENOSPC if at % 2 else errno.EIO, for_good=at % 3 == 0) as failure:
            try:
                case.act(root)
            except (UserError, OSError) as error:
                assert isinstance(error, UserError), f"step {at}, {failure.name}: {error!r}"
                refused = True
        state = case.look(root)
        if not refused and not failure.name:
            assert at > 3 and state != before
            return
        where = f"when step {at}, {failure.name}, is refused"
        try:
            case.act(root)
        except UserError:  # it is there, and nothing is written over
            assert name in ("a new training", "a backup") and state != before, where
        after = case.look(root)
        allowed = (before, after) if refused else (after,)
        assert state in allowed, f"{name} is half done {where}"
        assert after != before, f"{name} cannot be repeated {where}"
        shutil.rmtree(root)
    pytest.fail("200 steps were not enough")


def test_what_must_last_is_written_by_one_module():
    """`util/disk.py` flushes; whoever calls the system by themselves forgets a flush."""
    calls = re.compile(r"\bos\.(fsync|replace|rename)\(")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path in sorted((ROOT / "comparator").rglob("*.py"))
        if path.relative_to(ROOT) != Path("comparator/util/disk.py")
        for line in path.read_text(encoding="utf-8").splitlines()
        if calls.search(line)
    ]
    assert not found, "use comparator/util/disk.py"
