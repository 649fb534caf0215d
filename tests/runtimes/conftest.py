"""The toy runtime (tests/toys/numpy_toy.py), shared by what needs a runtime without torch."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from comparator import backends, runtimes
from comparator.backends import resolve
from comparator.engines import get_engine

TOYS = Path(__file__).resolve().parents[1] / "toys"


@pytest.fixture(scope="module")
def toy():
    """The toy's module as the backends find it, in the list of both packages."""

    def forget() -> None:
        for name in ("comparator.backends.numpy_toy", "comparator.runtimes.numpy_toy"):
            sys.modules.pop(name, None)
        backends.all_backends.cache_clear()
        runtimes.all_runtimes.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        for package in (backends, runtimes):
            patch.setattr(package, "__path__", [*package.__path__, str(TOYS)])
        forget()
        runtimes.runtime_for(resolve("toy"))
        yield sys.modules["comparator.runtimes.numpy_toy"]
        get_engine().unload()
    forget()
