"""A GPU that is lent by the call: asked for where there is one, and no trace of it elsewhere."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from comparator.backends import resolve
from comparator.core.request import GenerationSettings, Request
from comparator.core.variant import Cell
from comparator.deploy import zerogpu

ROOT = Path(__file__).resolve().parents[2]

# The package as far as it is used: `GPU` may be a decorator or called with the function.
PACKAGE = """
asked = []
def GPU(task=None, *, duration=None, size=None):
    def lend(*args, **kwargs):
        asked.append(duration(*args, **kwargs) if callable(duration) else duration)
        return task(*args, **kwargs)
    return lend
"""


def ask(code: str, *paths: Path, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT])), **env},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_elsewhere_a_function_stays_what_it_is():
    def run():
        return 1

    assert zerogpu.gpu(run, 60) is run and not zerogpu.active()


def test_on_zerogpu_each_call_asks_for_its_own_duration(tmp_path):
    (tmp_path / "spaces.py").write_text(PACKAGE)
    code = """
from comparator.deploy import zerogpu
import sys
assert "torch" not in sys.modules, "the package has to come before torch"
run = zerogpu.gpu(lambda n: n * 2, lambda n: n + 1)
import spaces
print(zerogpu.active(), run(20), spaces.asked)
"""
    assert ask(code, tmp_path, SPACES_ZERO_GPU="true") == "True 40 [21]"
    assert ask(code.replace("import spaces\n", "").replace("spaces.asked", "''"), tmp_path) == "False 40"


def test_the_folder_of_this_repo_is_not_taken_for_the_package():
    """`import spaces` finds spaces/ as an empty namespace where the package is missing."""
    code = "import spaces; from comparator.deploy import zerogpu; print(hasattr(spaces, 'GPU'), zerogpu.active())"
    assert ask(code, SPACES_ZERO_GPU="true") == "False False"
    assert not (ROOT / "spaces" / "__init__.py").exists(), "with it, a Space crashes"


def test_nothing_else_imports_the_package():
    for path in (ROOT / "comparator").rglob("*.py"):
        if path.name != "zerogpu.py":
            lines = [line.strip() for line in path.read_text().splitlines()]
            assert not [x for x in lines if x.startswith(("import spaces", "from spaces"))], path


def test_longer_work_asks_for_longer_up_to_the_most():
    def asked(columns=1, parameters=10**9, tokens=64, **settings):
        cells = tuple(Cell(resolve("nf4")) for _ in range(columns))
        request = Request("m/m", cells, "Hi", settings=GenerationSettings(max_new_tokens=tokens, **settings))
        return zerogpu.duration_s(request, parameters)

    assert asked() < asked(columns=2) < asked(columns=4)
    assert (
        asked() < asked(tokens=256) and asked() < asked(repeats=5) and asked() < asked(parameters=8 * 10**9)
    )
    assert asked(parameters=None) == asked()
    assert asked(columns=8, parameters=70 * 10**9, tokens=1024) == zerogpu.MAX_DURATION_S
    assert all(isinstance(asked(columns=n), int) for n in (1, 8))


@pytest.mark.parametrize("value", ["", "0", "false", "no"])
def test_only_zerogpu_itself_turns_it_on(value, monkeypatch):
    monkeypatch.setenv("SPACES_ZERO_GPU", value)
    assert zerogpu._package() is None
    importlib.reload(zerogpu)
    assert not zerogpu.active()
