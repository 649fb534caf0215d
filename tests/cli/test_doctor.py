"""`doctor`: what it prints and its exit code; it loads no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
from typer.testing import CliRunner

from comparator.cli import app


def doctor(*arguments: str) -> tuple[int, str]:
    wide = {
        "COLUMNS": "1000",
        "NO_COLOR": "1",
    }  # no line is wrapped, however long the path of the test's folder is
    result = CliRunner().invoke(app, ["doctor", *map(str, arguments)], env=wide)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.stdout.split())


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_models.save(folder, "llama", dtype="bfloat16", tie_word_embeddings=False, chat=True)
    return folder


def test_a_model_that_is_whole(llama: Path) -> None:
    code, text = doctor(llama, "-v", "nf4")
    assert code == 0, text
    assert "complete, 21 tensors, bf16" in text and "320 tokens" not in text.replace("320 tokens, all", "")
    assert "problem" not in text and "nf4, about" in text


def test_experts_that_stay_in_16_bits_are_stated_before_loading(tmp_path: Path) -> None:
    tiny_models.save(tmp_path, "mixtral", dtype="bfloat16", tie_word_embeddings=False, chat=True)
    code, text = doctor(tmp_path, "-v", "nf4", "-v", "bf16")
    assert code == 0, text
    assert text.count("of its weights are experts") == 1 and "nf4 leaves in 16 bits" in text


def test_everything_that_is_wrong_is_listed_at_once(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_models.save(tmp_path, "llama", dtype="bfloat16", tie_word_embeddings=False, chat=True)
    file = tmp_path / "model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if n != "lm_head.weight"}, file, {"format": "pt"})
    (tmp_path / "chat_template.jinja").write_text("nothing")
    code, text = doctor(tmp_path, "-v", "nf5", "-v", f"gptq@{llama}", "-a", "pirate")
    assert code == 1
    for words in (
        "lm_head.weight",
        "ignores the user's message",
        "no method “nf5”",
        "is not quantized",
        "pirate",
    ):
        assert words in text, f"“{words}” is missing from: {text}"


def test_json_has_what_the_table_has(llama: Path) -> None:
    result = CliRunner().invoke(
        app, ["doctor", str(llama), "-v", "nf4", "-v", "nf4@no/such:model", "--json", "-q"]
    )
    checks = json.loads(result.stdout)
    assert result.exit_code == 1 and not result.stderr, "-q leaves the progress out"
    assert [c["ok"] for c in checks if c["subject"].startswith("nf4")] == [True, False]


def test_a_model_that_does_not_open(tmp_path: Path) -> None:
    code, text = doctor(tmp_path)
    assert code == 1 and "no config.json" in text
