"""Settings with a data folder of their own."""

from __future__ import annotations

import pytest

from comparator.core.settings import Settings


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(data_dir=tmp_path / "data", public=False)


@pytest.fixture
def public(settings) -> Settings:
    return settings.model_copy(update={"public": True})
