"""An engine for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from comparator.core.settings import Settings
from comparator.engine.local import LocalEngine


@pytest.fixture(scope="module")
def own_engine() -> Iterator[LocalEngine]:
    engine = LocalEngine(Settings())
    yield engine
    engine.unload()
