"""Shared by all tests: settings and folders, the models, which tests share a worker, and what CI insists on."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

# Set before anything imports comparator, so that no test reads the person's own settings or saved data.
for _name in [n for n in os.environ if n.startswith("COMPARATOR_") or n in ("SPACE_ID", "HF_TOKEN")]:
    del os.environ[_name]
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["COMPARATOR_REPEATS"] = "1"  # tests of repeated runs ask for them
# OpenMP reads this when torch is imported, here and in what a test starts. Threads that spin while they wait would
# starve the other worker, the app that a test started, and whatever else the machine is doing.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

ROOT = Path(__file__).resolve().parent.parent
_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
_CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync "
    "--no-first-run"
).split()


def pytest_configure(config: pytest.Config) -> None:
    # Inherited by the workers of pytest-xdist, so that they have one core each.
    workers = config.getoption("numprocesses", None) or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, min(2, (os.cpu_count() or 1) // workers))))
    # The converted built-in model (269 MB) stays between runs: converting it takes longer than most tests.
    # What tests conversion itself sets its own folder.
    config._comparator_data = tempfile.mkdtemp(prefix="comparator-test-data-")
    cache = getattr(config, "cache", None)
    folder = cache.mkdir("comparator-models") if cache else Path(config._comparator_data) / "models"
    os.environ["COMPARATOR_CACHE_DIR"] = str(folder)
    os.environ["COMPARATOR_DATA_DIR"] = config._comparator_data


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config._comparator_data, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage() -> None:
    """Loading and unloading a model collects garbage. That would look at all that was ever imported, which takes longer
    than loading a small model does. What is alive between two files stays to the end."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def settings_env(monkeypatch: pytest.MonkeyPatch):
    """`settings_env(max_columns=2)` sets COMPARATOR_MAX_COLUMNS for this test and drops what was read before."""
    from comparator.core.settings import get_settings

    def change(**variables: object) -> None:
        for name, value in variables.items():
            key = f"COMPARATOR_{name.upper()}"
            monkeypatch.delenv(key, raising=False) if value is None else monkeypatch.setenv(key, str(value))
        get_settings.cache_clear()

    yield change
    monkeypatch.undo()
    get_settings.cache_clear()


@pytest.fixture
def own_dirs(tmp_path: Path, settings_env) -> Path:
    """An empty cache and data folder for this test alone; returns the folder that holds `cache` and `data`."""
    settings_env(cache_dir=tmp_path / "cache", data_dir=tmp_path / "data")
    return tmp_path


@pytest.fixture(scope="session")
def builtin():
    """The built-in model as a `Checkpoint`, converted at most once."""
    import bitsandbytes  # noqa: F401  (with torch and transformers: what `gc.freeze` is for)

    from comparator.core.request import BUILTIN_MODEL
    from comparator.sources import open_checkpoint

    checkpoint = open_checkpoint(BUILTIN_MODEL)
    gc.freeze()
    return checkpoint


@pytest.fixture(scope="session")
def two_layers(builtin, tmp_path_factory) -> Path:
    """The built-in model cut to its first two layers: real weights, a quarter of the work, and no sense in its text."""
    import tiny_models

    return tiny_models.cut(builtin.path, tmp_path_factory.mktemp("models") / "two-layers")


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory) -> str:
    """A model of a few kB with a chat template, as a folder."""
    import tiny_models

    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_models.save(folder, chat=True)
    return str(folder)


@pytest.fixture(scope="module")
def engine() -> Iterator:
    """An engine of this process for the tests of one file."""
    from comparator.core.settings import Settings
    from comparator.engine.local import LocalEngine

    made = LocalEngine(Settings())
    yield made
    made.unload()


@pytest.fixture(scope="session")
def browser():
    """A Chromium, one for each worker: Playwright's API cannot be started twice in one process."""
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path is None:
        (pytest.fail if _CI else pytest.skip)("There is no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=path, args=_CHROMIUM_FLAGS)
        yield chromium
        chromium.close()


# ---------------------------------------------------------------- which tests run in one worker

# Folders whose tests share a server, a browser or a cluster for the whole session. All others share by file.
_TOGETHER = ("tests/ui/", "tests/cluster/")
# The tests of the page would take one worker longer than the others have to do; these look at one comparison (`compared`).
_COMPARED = tuple(f"tests/ui/test_{name}.py" for name in ("accessible", "history", "page"))
# What takes longest starts first, so that the workers end at about the same time.
_LONGEST = (*_TOGETHER, "tests/adapters/test_attach.py", "tests/training/test_registry.py")


def _group(nodeid: str) -> str:
    path = nodeid.partition("::")[0]
    if path in _COMPARED:
        return "compared"
    return next((folder for folder in _TOGETHER if path.startswith(folder)), path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [not item.nodeid.startswith(start) for start in _LONGEST])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """One worker for each group. `--dist loadgroup` of pytest-xdist 3.8 does nothing with pytest 9.2: it writes the
    group into `item._nodeid`, which is gone."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(nodeid)

    return ByGroup(config, log)


# ---------------------------------------------------------------- what CI insists on


def _is_browser(report) -> bool:
    """A browser test, or a whole file of tests/ui that was skipped while it was collected."""
    return "browser" in getattr(report, "keywords", {}) or (
        isinstance(report, pytest.CollectReport) and "/ui/" in f"/{report.nodeid}"
    )


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    skipped = [r for r in terminalreporter.stats.get("skipped", []) if _is_browser(r)]
    for report in skipped if _CI else []:
        terminalreporter.write_line(f"CI: a browser test was skipped: {report.nodeid}", red=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a skipped browser test, or a whole run without one that passed, is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if not _CI or reporter is None or session.config.option.collectonly:
        return
    skipped = [r for r in reporter.stats.get("skipped", []) if _is_browser(r)]
    passed = [r for r in reporter.stats.get("passed", []) if _is_browser(r)]
    options = session.config.option
    whole_run = (
        session.config.args == session.config.getini("testpaths")
        and not options.keyword
        and options.markexpr in ("", "not slow")
    )
    if skipped or (whole_run and not passed):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if not skipped:
            reporter.write_line("CI: no browser test passed, so the page was not tested.", red=True)
