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


@pytest.fixture(scope="session")
def gpu() -> str:
    """The first CUDA device. Without one the test is skipped, before fixtures of its module are made."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return "cuda:0"


@pytest.fixture(scope="module")
def register(tmp_path_factory) -> Iterator[Callable[[str, str], Backend]]:
    """`register(name, source)`: `comparator/backends/<name>.py` with this content, found as any other file there, and in
    place of one of the same name. Returns the backend of that name. The tests of the file see it."""
    folder: Path = tmp_path_factory.mktemp("backends")
    path, names = list(backends.__path__), []
    real: dict[str, object] = {}

    def add(name: str, source: str) -> Backend:
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
        names.append(name)
        real.update({module: sys.modules.pop(module) for module in _modules(name)})
        backends.__path__[:] = [str(folder), *path]
        backends.all_backends.cache_clear()
        return next(b for b in backends.all_backends() if b.name == name)

    yield add
    backends.__path__[:] = path
    for module in [m for name in names for m in _modules(name)]:
        del sys.modules[module]
    sys.modules.update(real)
    for module in real.keys() & {f"comparator.backends.{name}" for name in names}:
        setattr(backends, module.rpartition(".")[2], real[module])
    backends.all_backends.cache_clear()


def _modules(name: str) -> list[str]:
    """The backend's module and what it is made of, where they are imported."""
    return [m for m in sys.modules if f"{m}.".startswith(f"comparator.backends.{name}.")]


@pytest.fixture(scope="module")
def own_engine() -> Iterator[LocalEngine]:
    engine = LocalEngine(Settings())
    yield engine
    engine.unload()
