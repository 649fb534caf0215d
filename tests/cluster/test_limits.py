"""What visitors may open is the app's to say on every node. No Ray is started."""

from __future__ import annotations

import pytest

from comparator.cluster import ray_api
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


def test_a_cluster_without_a_token_is_refused_in_words(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    for address in ("auto", "10.0.0.7:6379", "ray://head.example:10001", "ray://127.0.0.1.evil.example:1"):
        with pytest.raises(UserError, match="no token for the Ray cluster") as refused:
            ray_api.connect(address)
        assert "COMPARATOR_RAY_WITHOUT_TOKEN" in refused.value.advice
    for own in ("127.0.0.1:6379", "ray://[::1]:10001", "localhost:6379"):
        assert ray_api._is_loopback(own)
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")
    assert ray_api.has_token({"HOME": str(tmp_path)})
