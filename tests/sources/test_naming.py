"""One name means one thing: built in, file, folder or Hub repo; public mode holds."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from comparator.core.errors import UserError
from comparator.core.request import BUILTIN_MODEL
from comparator.core.settings import Settings
from comparator.sources import builtin_names, naming, open_checkpoint


def settings(**values) -> Settings:
    return Settings(**{"public": False, **values})


@pytest.mark.parametrize(
    ("name", "kind", "text", "revision"),
    [
        ("smollm2-135m", "builtin", "smollm2-135m", None),
        (" SmolLM2-135M ", "builtin", "smollm2-135m", None),
        ("user/name", "hub", "user/name", None),
        ("user/name@main", "hub", "user/name", "main"),
        ("user/name@refs/pr/4", "hub", "user/name", "refs/pr/4"),
        ("user/name@" + "a" * 40, "hub", "user/name", "a" * 40),
        ("gpt2", "hub", "gpt2", None),
        ("Qwen/Qwen2.5-0.5B-Instruct", "hub", "Qwen/Qwen2.5-0.5B-Instruct", None),
        ("bigscience/bloom-560m@v1.0", "hub", "bigscience/bloom-560m", "v1.0"),
    ],
)
def test_names(name: str, kind: str, text: str, revision: str | None, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert naming.parse(name, settings()) == naming.Name(kind, text, revision)


def test_an_existing_folder_comes_before_a_repo_of_the_same_name(tmp_path, monkeypatch) -> None:
    (tmp_path / "user" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert naming.parse("user/name", settings()).kind == "folder"
    assert naming.parse("user/other", settings()).kind == "hub"
    assert naming.parse("user/name", settings(public=True)).kind == "hub", (
        "public mode must not tell what exists"
    )


@pytest.mark.parametrize("name", ["smollm2-135", "smolm2-135m", "smollm2_135m", "SmolLM-135M"])
def test_a_near_miss_is_pointed_out(name: str) -> None:
    with pytest.raises(UserError) as caught:
        naming.parse(name, settings())
    assert f"Did you mean {BUILTIN_MODEL}?" in caught.value.advice


@pytest.mark.parametrize(
    "name",
    ["", "   ", "a b", "user/name/more", "user//name", "/", "user/", "https://huggingface.co/user/name", "user/na--me",
     "user/..", "-x/y", "user/name@", "user/name@a b", "user/name@../../x", "x" * 300, "model\x00", "ü/ö", "a:b", "name.git"],
)  # fmt: skip
def test_what_is_no_name_is_a_problem(name: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        open_checkpoint(name, settings=settings())
    assert caught.value.problem and caught.value.advice


@example("~nobody-of-this-name")  # a home directory that nobody has
@given(st.text(max_size=60))
def test_any_text_gives_a_name_or_a_problem(name: str) -> None:
    for public in (False, True):
        try:
            found = naming.parse(name, settings(public=public))
        except UserError as problem:
            assert problem.advice
        else:
            assert not public or found.kind in ("builtin", "hub")


@pytest.mark.parametrize(
    "name", ["/etc", "./x", "~/model", "../..", "model.gguf", "C:\\models\\x", "/etc/passwd"]
)
def test_public_mode_refuses_local_paths_without_looking(name: str) -> None:
    with pytest.raises(UserError, match="public"):
        open_checkpoint(name, settings=settings(public=True))


def test_builtin_names() -> None:
    assert BUILTIN_MODEL in builtin_names()
