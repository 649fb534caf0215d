"""Shared by all tests: where models and data are kept, the built-in model, and what CI insists on."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Set before anything imports comparator, so that no test reads the person's own settings or saved data.
for _name in [n for n in os.environ if n.startswith("COMPARATOR_") or n in ("SPACE_ID", "HF_TOKEN")]:
    del os.environ[_name]
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
# A test and the app it started share two cores: OpenMP threads that spin while they wait would starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"

ROOT = Path(__file__).resolve().parent.parent
_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")


def pytest_configure(config: pytest.Config) -> None:
    # The converted built-in model (269 MB) stays between runs: converting it takes longer than most tests.
    # What tests conversion itself sets its own folder.
    config._comparator_data = tempfile.mkdtemp(prefix="comparator-test-data-")
    cache = getattr(config, "cache", None)
    folder = cache.mkdir("comparator-models") if cache else Path(config._comparator_data) / "models"
    os.environ["COMPARATOR_CACHE_DIR"] = str(folder)
    os.environ["COMPARATOR_DATA_DIR"] = config._comparator_data


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(config._comparator_data, ignore_errors=True)


@pytest.fixture
def settings_env(monkeypatch: pytest.MonkeyPatch):
    """`settings_env(max_columns=2)` sets COMPARATOR_MAX_COLUMNS for this test and drops what was read before."""
    from comparator.settings import get_settings

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
    from comparator.sources import open_checkpoint
    from comparator.types import BUILTIN_MODEL

    return open_checkpoint(BUILTIN_MODEL)


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
