"""What visitors may open is the app's to say on every node. No Ray is started."""

from __future__ import annotations

import pytest

from comparator.cluster.actor import ActorEngine, visitors_limits
from comparator.core.errors import UserError
from comparator.core.settings import Settings, get_settings


def test_an_actor_opens_nothing_that_the_app_would_not(monkeypatch, settings_env, tmp_path):
    (tmp_path / "models" / "secret").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)  # the node's folder, where `models/secret` is a path
    settings_env(public=0)  # the node's own setting
    for name, value in visitors_limits(Settings(public=True, allowed_models="Qwen/*,models/*")).items():
        monkeypatch.setenv(name, value)
    get_settings.cache_clear()
    engine = ActorEngine(Settings(), 1)
    for name, why in (("models/secret", "not from a path"), ("somebody/else", "COMPARATOR_ALLOWED_MODELS")):
        with pytest.raises(UserError, match=why):
            engine.facts(name)
