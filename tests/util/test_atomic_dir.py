"""Folders of the cache are complete or not there, whatever happens while they are made."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path

import pytest

from comparator.core.errors import Stopped, UserError
from comparator.util import atomic_dir

ROOT = Path(__file__).resolve().parents[2]


def seen(folder: Path) -> list[str]:
    """What a person or a later run would find; lock files hold nothing."""
    return sorted(p.name for p in folder.iterdir() if p.name != ".locks") if folder.exists() else []


def run_python(code: str, *arguments: object, **kwargs) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **kwargs)


def test_a_folder_appears_whole_and_is_built_once(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "cache" / "model"
    with atomic_dir.building(path) as tmp:
        (tmp / "sub").mkdir()
        (tmp / "sub" / "weights").write_bytes(b"x" * 1000)
        assert not path.exists(), "the folder was visible before it was complete"
    assert (path / "sub" / "weights").stat().st_size == 1000
    with atomic_dir.building(path) as tmp:
        assert tmp is None, "a folder that is there must not be built again"
    assert seen(path.parent) == ["model"]


def test_files_of_the_cache_can_be_read_by_others_as_the_umask_says(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        with atomic_dir.building(tmp_path / "model") as tmp:
            file = tmp / "weights"
            file.touch()
            file.chmod(0o600)  # as safetensors writes
    finally:
        os.umask(old)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "model" / "weights").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "error", [ValueError("broken"), Stopped(), KeyboardInterrupt(), UserError("no", "way")]
)
def test_whatever_goes_wrong_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), atomic_dir.building(tmp_path / "model") as tmp:
        (tmp / "half").write_text("half")
        raise error
    assert seen(tmp_path) == []
    with atomic_dir.building(tmp_path / "model") as tmp:
        assert tmp is not None, "after a failure the next one must be able to build"


def test_a_disk_that_is_full_is_named_and_nothing_stays(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError) as caught,
        atomic_dir.building(tmp_path / "model", what="the test model") as tmp,
    ):
        (tmp / "first").write_text("written")
        (tmp / "weights").symlink_to("/dev/full")  # the kernel's own disk that is always full
        with open(tmp / "weights", "wb", buffering=0) as file:
            file.write(b"x" * 4096)
    assert "disk" in caught.value.problem and "the test model" in caught.value.problem
    assert "COMPARATOR_CACHE_DIR" in caught.value.advice
    assert seen(tmp_path) == []


def test_safetensors_own_words_for_a_full_disk_are_understood(tmp_path: Path) -> None:
    """safetensors wraps the system's error in a type of its own; a limit on file size makes a real one."""
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import save_file

    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(UserError) as caught, atomic_dir.building(tmp_path / "model") as tmp:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
            save_file({"w": numpy.zeros(1_000_000, numpy.float32)}, tmp / "model.safetensors")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, signal_before)
    assert "filled up" in caught.value.problem, f"not taken for a full disk: {caught.value}"
    assert seen(tmp_path) == []


def test_too_little_space_is_told_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="MB free") as caught,
        atomic_dir.building(tmp_path / "m", need_bytes=10**18),
    ):
        pytest.fail("the block ran although its result cannot fit")
    assert "1,000,000,000,000 MB" in caught.value.problem
    assert seen(tmp_path) == []


def test_a_cache_that_cannot_be_made_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with (
        pytest.raises(UserError, match="cannot be created"),
        atomic_dir.building(tmp_path / "file" / "models" / "m"),
    ):
        pytest.fail("built below a file")


def test_a_read_only_cache_is_a_problem(tmp_path: Path) -> None:
    """In a process without root's rights, to whom a folder of mode 555 is really read-only."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o555)
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(folder.stat().st_mode | 0o055)
    child = run_python(
        """
        import os, sys
        from pathlib import Path
        import filelock
        from comparator.util import atomic_dir
        from comparator.types import UserError
        if os.getuid() == 0:
            os.setgroups([]); os.setgid(65534); os.setuid(65534)
        try:
            with atomic_dir.building(Path(sys.argv[1]) / "models" / "m"):
                print("built")
        except UserError as problem:
            print(problem)
        """,
        tmp_path / "cache",
    )
    said = child.communicate(timeout=60)[0]
    assert "cannot be written" in said and "COMPARATOR_CACHE_DIR" in said, said
    assert seen(tmp_path / "cache") == []


def _build(path: str, delay_s: float, results) -> None:
    with atomic_dir.building(Path(path)) as tmp:
        if tmp is not None:
            (tmp / "a").write_text("1")
            time.sleep(delay_s)
            (tmp / "b").write_text("2")
        results.put(tmp is not None)
    assert (Path(path) / "b").read_text() == "2"


def test_of_several_processes_one_builds_and_all_get_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    path = str(tmp_path / "model")
    children = [context.Process(target=_build, args=(path, 0.5, results)) for _ in range(4)]
    for child in children:
        child.start()
    built = [results.get(timeout=60) for _ in children]
    for child in children:
        child.join(30)
    assert [c.exitcode for c in children] == [0] * 4
    assert sum(built) == 1, f"{sum(built)} of 4 processes built the same folder"


def test_waiting_for_another_says_so_and_can_be_stopped(tmp_path: Path) -> None:
    path, inside, leave = tmp_path / "model", threading.Event(), threading.Event()

    def hold() -> None:
        with atomic_dir.building(path) as tmp:
            (tmp / "a").write_text("1")
            inside.set()
            leave.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert inside.wait(10)
    messages: list[str] = []

    def progress(fraction: float | None, message: str) -> None:
        messages.append(message)
        if len(messages) == 2:
            raise Stopped

    started_s = time.monotonic()
    with pytest.raises(Stopped), atomic_dir.building(path, progress=progress):
        pytest.fail("two were inside at once")
    assert time.monotonic() - started_s < 15
    assert "waiting" in messages[0]
    leave.set()
    holder.join(10)
    assert (path / "a").exists(), "the one that was building must not be harmed by the one that gave up"


def test_what_a_killed_process_left_is_cleared_and_its_lock_is_free(tmp_path: Path) -> None:
    child = run_python(
        """
        import sys, time
        from pathlib import Path
        from comparator.util import atomic_dir
        with atomic_dir.building(Path(sys.argv[1])) as tmp:
            (tmp / "half").write_bytes(b"x" * 1000)
            print("inside", flush=True)
            time.sleep(600)
        """,
        tmp_path / "model",
    )
    assert child.stdout.readline().strip() == "inside"
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=30)
    assert len(seen(tmp_path)) == 1, "the killed process should have left its temporary folder"
    with atomic_dir.building(tmp_path / "model") as tmp:
        assert tmp is not None, "half a folder was taken for a whole one"
        (tmp / "whole").write_text("1")
    assert seen(tmp_path) == ["model"]


def test_remove(tmp_path: Path) -> None:
    with atomic_dir.building(tmp_path / "model") as tmp:
        (tmp / "a").write_text("1")
    atomic_dir.remove(tmp_path / "model")
    atomic_dir.remove(tmp_path / "model")
    assert seen(tmp_path) == []


def test_reading_something_else_is_not_taken_for_a_read_only_cache(tmp_path: Path) -> None:
    error = PermissionError(13, "Permission denied", "/somewhere/else/model.gguf")
    assert atomic_dir.disk_problem(error, tmp_path / "model", "it") is None
    mine = PermissionError(13, "Permission denied", str(tmp_path / "x"))
    assert "cannot be written" in atomic_dir.disk_problem(mine, tmp_path / "model", "it").problem
