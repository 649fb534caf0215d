"""Servers by name: the setting COMPARATOR_ENDPOINTS, addresses, keys from the environment."""

from __future__ import annotations

import pytest

from comparator.backends import offers, resolve
from comparator.core.endpoints import find_endpoint, parse_address, parse_endpoints
from comparator.core.errors import UserError
from comparator.core.settings import get_settings

LISTED = "vllm=http://10.0.0.5:8000/v1/ my-llama=https://host/v1#org/model:7b"


def test_the_setting_is_names_and_addresses_with_a_model_after_the_hash():
    vllm, llama = parse_endpoints(LISTED).values()
    assert (vllm.name, vllm.url, vllm.model) == ("vllm", "http://10.0.0.5:8000/v1", None)
    assert (llama.name, llama.url, llama.model) == ("my-llama", "https://host/v1", "org/model:7b")
    assert parse_endpoints("") == {}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("http://host/v1", "not NAME=ADDRESS"),
        ("Big=http://host/v1", "not NAME=ADDRESS"),
        ("a=http://host/v1 a=http://other/v1", "appears twice"),
        ("a=host:8000", "begins with http"),
        ("a=file:///etc/passwd", "begins with http"),
        ("a=http://host:port/v1", "begins with http"),
        ("a=http://user:hush@host/v1", "password or a query"),
        ("a=http://host/v1?key=hush", "password or a query"),
    ],
)
def test_a_wrong_setting_is_said_at_the_start_without_its_secrets(settings_env, text, problem):
    settings_env(endpoints=text)
    with pytest.raises(UserError, match=problem) as caught:
        get_settings()
    assert caught.value.advice and "hush" not in str(caught.value), "a password stands in a message"


def test_keys_come_from_the_environment_for_listed_servers_alone(monkeypatch):
    monkeypatch.setenv("COMPARATOR_ENDPOINT_KEY_MY_LLAMA", "key")
    named = find_endpoint("my-llama", LISTED)
    assert named.key == "key" and "key" not in repr(named).replace("key_variable", "")
    assert find_endpoint("vllm", LISTED).key is None
    assert parse_address("https://host/v1").key is None, "a typed address gets a key"
    with pytest.raises(UserError, match=r"no endpoint “nope”.*vllm, my-llama"):
        find_endpoint("nope", LISTED)


def test_an_address_is_written_as_it_is_and_checked(settings_env):
    typed = resolve("endpoint@http://10.0.0.5:8000/v1#org/model")
    assert typed.source == "http://10.0.0.5:8000/v1#org/model"
    assert typed.notation == "endpoint@http://10.0.0.5:8000/v1#org/model" and resolve(typed.notation) == typed
    assert resolve("endpoint@http://host/v1#llama3.2:1b").source == "http://host/v1#llama3.2:1b"
    assert resolve("endpoint@http%3A//host%3A8000/v1").notation == "endpoint@http://host:8000/v1"
    for wrong in (
        "endpoint@user/repo",
        "endpoint@name@main",
        "endpoint@ftp://host/v1",
        "endpoint@http://a:b@host/v1",
    ):
        with pytest.raises(UserError):
            resolve(wrong)
    settings_env(endpoints=LISTED)
    assert offers("any model") == ["endpoint@vllm", "endpoint@my-llama"]


def test_a_link_names_it_as_it_was_typed():
    from comparator.core.request import Request
    from comparator.core.variant import Cell
    from comparator.store.links import parse_query_string, recipe_of, recipe_url

    cells = tuple(
        Cell(resolve(n)) for n in ("bf16", "endpoint@http://10.0.0.5:8000/v1#org/model", "endpoint@vllm")
    )
    url = recipe_url("http://localhost:7860/", recipe_of(Request("smollm2-135m", cells, "Hi")))
    opened = parse_query_string(url.partition("?")[2])
    assert opened.cells == cells
