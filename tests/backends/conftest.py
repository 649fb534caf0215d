"""Backends that exist for one test, and an engine of its own to load them with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from comparator import backends
from comparator.backends.base import Backend
from comparator.core.settings import Settings
from comparator.engine.local import LocalEngine


@pytest.fixture(scope="module")
def register(tmp_path_factory) -> Iterator[Callable[[str, str], Backend]]:
    """`register(name, source)`: `comparator/backends/<name>.py` with this content, found as any other file there.
    Returns the backend of that name. The tests of the file see it."""
    folder: Path = tmp_path_factory.mktemp("backends")
    path, names = list(backends.__path__), []

    def add(name: str, source: str) -> Backend:
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
        names.append(name)
        backends.__path__[:] = [*path, str(folder)]
        backends.all_backends.cache_clear()
        return next(b for b in backends.all_backends() if b.name == name)

    yield add
    backends.__path__[:] = path
    for name in names:
        sys.modules.pop(f"comparator.backends.{name}", None)
    backends.all_backends.cache_clear()


@pytest.fixture(scope="module")
def own_engine() -> Iterator[LocalEngine]:
    engine = LocalEngine(Settings())
    yield engine
    engine.unload()
