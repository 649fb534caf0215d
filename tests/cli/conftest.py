"""The command line in this process: what `main` does around a command, without seconds of imports for each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from comparator import cli, engines
from comparator.deploy.process_engine import process_engine


@dataclass
class Ended:
    """What a command left: its exit code and its output."""

    code: int
    out: str
    err: str


@pytest.fixture
def here(monkeypatch, capfd) -> Callable[..., Ended]:
    """`here("run", "-p", "Hello")` runs a command in this process."""

    def run(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["comparator", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code or 0, *capfd.readouterr())

    return run


@pytest.fixture
def own_engine() -> Iterator[None]:
    """The process's engine is made anew, with the settings of this test."""
    caches = engines.get_engine, engines.get_trainings, process_engine
    for cached in caches:
        cached.cache_clear()
    yield
    engines.get_engine().unload()
    for cached in caches:
        cached.cache_clear()
