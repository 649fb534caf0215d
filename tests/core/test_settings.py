"""Settings come from the environment; a wrong one is named; the README lists each."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from comparator.core.errors import UserError
from comparator.core.request import BUILTIN_MODEL
from comparator.core.settings import Settings, get_settings, parse_bytes, parse_max_memory

ROOT = Path(__file__).resolve().parents[2]


def test_defaults(settings_env, monkeypatch):
    monkeypatch.delenv("COMPARATOR_CACHE_DIR")
    settings_env()
    settings = get_settings()
    assert (settings.host, settings.port, settings.model) == ("127.0.0.1", 7860, BUILTIN_MODEL)
    assert settings.cache_dir.is_absolute() and "~" not in str(settings.cache_dir)
    assert settings.budget_bytes is None and not settings.public


def test_the_environment_wins(settings_env, tmp_path):
    settings_env(port=8000, max_columns=3, memory_budget="12GiB", cache_dir=tmp_path, model="user/name")
    settings = get_settings()
    assert (settings.port, settings.max_columns, settings.cache_dir, settings.model) == (
        8000,
        3,
        tmp_path,
        "user/name",
    )
    assert settings.budget_bytes == 12 * 2**30


def test_a_space_listens_to_all_and_is_public(settings_env, monkeypatch):
    monkeypatch.setenv("SPACE_ID", "user/space")
    settings_env()
    assert get_settings().host == "0.0.0.0" and get_settings().public


@pytest.mark.parametrize(
    ("name", "value"), [("port", "http"), ("port", "70000"), ("max_columns", "0"), ("max_new_tokens", "many")]
)
def test_a_wrong_value_names_its_variable(settings_env, name, value):
    settings_env(**{name: value})
    with pytest.raises(UserError, match=f"COMPARATOR_{name.upper()} is “{value}”") as caught:
        get_settings()
    assert caught.value.advice


@pytest.mark.parametrize("value", ["lots", "12 parsecs", "GiB", "inf", "nan", "-1GiB"])
def test_a_wrong_amount_of_memory_is_told_at_the_start(settings_env, value):
    settings_env(memory_budget=value)
    with pytest.raises(UserError):
        get_settings()


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1073741824", 2**30),
        ("12GiB", 12 * 2**30),
        ("500 MB", 500_000_000),
        ("1.5 gb", 1_500_000_000),
        ("64KiB", 65536),
    ],
)
def test_amounts(text, count):
    assert parse_bytes(text) == count


def test_limits_per_device():
    assert parse_max_memory("0=6GiB, cpu=20GB") == {0: 6 * 2**30, "cpu": 20 * 10**9}
    assert parse_max_memory(None) is None
    for wrong in ("6GiB", "gpu=6GiB", "0=", "0=lots"):
        with pytest.raises(UserError):
            parse_max_memory(wrong)


def documented(*names: str) -> set[str]:
    return set(
        re.findall(r"COMPARATOR_[A-Z_]+", "".join((ROOT / n).read_text(encoding="utf-8") for n in names))
    )


def test_every_setting_is_documented():
    known = {f"COMPARATOR_{name.upper()}" for name in Settings.model_fields}
    everywhere = documented("README.md", "docs/space.md")
    assert known <= everywhere, f"neither in README.md nor in docs/space.md: {sorted(known - everywhere)}"
    assert everywhere <= known, f"documented, but not a setting: {sorted(everywhere - known)}"
    first = ("HOST", "PORT", "CACHE_DIR", "DATA_DIR", "MEMORY_BUDGET", "MODEL", "MAX_NEW_TOKENS", "MAX_PROMPT_TOKENS",
             "MAX_COLUMNS")  # fmt: skip
    assert {f"COMPARATOR_{name}" for name in first} <= documented("README.md")


def test_the_defaults_in_the_readme_are_the_defaults():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `COMPARATOR_([A-Z_]+)` \| `([^`]+)` \|", text, re.M))
    assert len(rows) >= 8
    for name, default in rows.items():
        field = Settings.model_fields[name.lower()]
        assert str(field.get_default(call_default_factory=True)) == default, f"COMPARATOR_{name}"
