"""The Python API: plain values become a request, and what cannot be understood is named."""

from __future__ import annotations

import pytest

from comparator import api
from comparator.core.errors import UserError
from comparator.core.request import EvalSettings, GenerationSettings, Request
from comparator.core.variant import Adapter, Cell, Variant


def labels(request: Request) -> list[str]:
    return [cell.label for cell in request.cells]


def test_columns_are_variants_times_adapters():
    assert labels(api.request("Hi")) == ["bf16", "int8", "nf4"]
    assert labels(api.request("Hi", "nf4")) == ["nf4"], "one string is one variant, not its letters"
    assert labels(api.request("Hi", ["bf16", Variant("nf4")], adapters=["pirate", Adapter("pirate", scale=0.5)])) == [
        "bf16", "bf16 + pirate", "bf16 + pirate*0.5", "nf4", "nf4 + pirate", "nf4 + pirate*0.5",
    ]  # fmt: skip
    assert labels(api.request("Hi", "nf4", adapters=[None, "none", "pirate"])) == ["nf4", "nf4 + pirate"]


def test_a_column_is_read_as_it_is_called():
    for cell in api.request("Hi", ["nf4:dq"], adapters=["user/repo@main*2:merged"]).cells:
        assert api.cell(cell.label) == cell
    assert api.request("Hi", reference="nf4").reference == Cell(Variant("nf4"))


def test_settings_arrive(settings_env):
    request = api.request(
        "Hi", max_new_tokens=5, seed=3, system="", chat=False, max_memory="cpu=1GiB", evict=False
    )
    assert request.settings == GenerationSettings(max_new_tokens=5, seed=3)
    assert (request.system, request.chat, request.max_memory, request.evict) == (
        None,
        False,
        "cpu=1GiB",
        False,
    )
    settings_env(model="user/name")
    assert api.request("Hi").model == "user/name"
    assert api.request("Hi", model="other/name").model == "other/name"


def test_naming_a_text_asks_for_fidelity_on_it(tmp_path):
    assert api.request("Hi").fidelity == "prompt"
    path = tmp_path / "notes.txt"
    path.write_text("\ufeffSome text.", encoding="utf-8")
    request = api.request("Hi", eval_text=path, context=128, stride=64)
    assert request.fidelity == "text"
    assert request.evaluation == EvalSettings("Some text.", "notes.txt", 128, 64)
    assert api.request("Hi", eval_text="wikitext2").evaluation.name == "wikitext2"
    assert api.request("Hi", eval_text=path, fidelity="none").fidelity == "none"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"prompt": 7}, "prompt must be text, not int"),
        ({"prompt": "caf\udce9"}, "not UTF-8"),
        ({"prompt": "Hi", "max_tokens": 5}, "Did you mean max_new_tokens"),
        ({"prompt": "Hi", "fidelity": "all"}, "none, prompt or text"),
        ({"prompt": "Hi", "context": 1}, "context is 1"),
        ({"prompt": "Hi", "stride": 0}, "stride is 0"),
        ({"prompt": "Hi", "context": 64, "stride": 65}, "stride 65"),
        ({"prompt": "Hi", "eval_text": "/no/such/file"}, "/no/such/file"),
        ({"prompt": "Hi", "variants": ["nf5"]}, "nf5"),
        ({"prompt": "Hi", "adapters": ["*2"]}, "adapter"),
        ({"prompt": "Hi", "reference": "nf5"}, "nf5"),
    ],
)
def test_what_is_wrong_is_named(arguments, said):
    with pytest.raises(UserError, match=said.replace("*", r"\*")) as caught:
        api.request(**arguments)
    assert caught.value.advice


@pytest.mark.parametrize(("content", "said"), [(b"", "empty"), (b" \n", "empty"), (b"caf\xe9", "UTF-8")])
def test_a_text_file_that_is_none(content, said, tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=said):
        api.read_text(path, "text")
    with pytest.raises(UserError):
        api.read_text(tmp_path, "text")


def test_the_package_takes_a_request_too():
    import comparator

    with pytest.raises(UserError, match="prompt is empty"):
        comparator.compare(Request("smollm2-135m", (Cell(Variant("bf16")),), " "))
