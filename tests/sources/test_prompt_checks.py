"""Tokenizer, chat template and stop tokens that do not fit are said by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny_models

from comparator.sources import open_checkpoint
from comparator.sources.prompt_checks import Check, check

TURNS = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}</s>{% endfor %}"
)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save(folder, "llama", chat=True)
    return folder


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "copy"))


def found(folder: Path) -> dict[str, Check]:
    return {c.subject: c for c in check(open_checkpoint(str(folder)))}


def template(folder: Path, text: str) -> Path:
    (folder / "chat_template.jinja").write_text(text)
    return folder


def test_the_built_in_model_is_fine(builtin) -> None:
    checks = check(builtin)
    assert all(c.ok for c in checks) and [c.subject for c in checks] == [
        "tokenizer",
        "chat template",
        "stop tokens",
    ]
    assert "system, assistant" in checks[1].found and "<|im_end|>" in checks[2].found


def test_tokens_without_a_row_in_the_embedding(tmp_path: Path) -> None:
    tiny_models.save(tmp_path, "llama", vocab_size=200)
    problem = found(tmp_path)["tokenizer"]
    assert not problem.ok and "no row in the embedding" in problem.found and "200" in problem.found


def test_a_tokenizer_that_cannot_be_read(copy: Path) -> None:
    (copy / "tokenizer.json").write_text("{}")
    assert not found(copy)["tokenizer"].ok


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{{ nothing.here.at.all }}", "rejects"),
        ("{% for m in messages %}", "rejects"),
        ("Say something.", "ignores the user's message"),
        ("<s><s>{% for m in messages %}{{ m['content'] }}{% endfor %}", "two '<s>'"),
    ],
)
def test_a_template_that_does_not_serve(copy: Path, text: str, words: str) -> None:
    problem = found(template(copy, text))["chat template"]
    assert not problem.ok and words in problem.found


def test_roles_that_a_template_refuses_are_named(copy: Path) -> None:
    checks = found(template(copy, TURNS))
    assert checks["chat template"].ok and "(not system)" in checks["chat template"].found
    assert checks["stop tokens"].ok, "the turn ends with </s>, and so does an answer"


def test_a_turn_that_ends_with_a_token_that_does_not_stop_an_answer(copy: Path) -> None:
    file = template(copy, TURNS) / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 0}))
    problem = found(copy)["stop tokens"]
    assert not problem.ok and "'</s>' (1)" in problem.found and "'<s>' (0)" in problem.found


def test_a_model_without_a_template(tmp_path: Path) -> None:
    tiny_models.save(tmp_path, "llama")
    checks = found(tmp_path)
    assert checks["chat template"].ok and "raw text" in checks["chat template"].found
