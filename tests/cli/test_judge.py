"""`judge` on a document: verdicts and reasons are printed and kept in the file."""

from __future__ import annotations

import pytest
import sample
import tiny_models
from openai_server import OpenAIServer, script

from comparator.core import document
from comparator.core.result import CellResult
from comparator.reporting import export


@pytest.fixture
def server(settings_env):
    tokenizer = tiny_models.tokenizer(chat=True)
    says = tokenizer("It is shorter.\nVerdict: A", add_special_tokens=False)["input_ids"]
    with OpenAIServer(tokenizer, script(says, tiny_models.VOCABULARY, tokenizer.eos_token_id)) as server:
        settings_env(endpoints=f"judge={server.url}")
        yield server


def test_a_judge_on_a_document(here, own_engine, server, tmp_path):
    tiny_models.save(tmp_path / "model", chat=True)
    cells = tuple(CellResult(name, text=f"Answer {n}.") for n, name in enumerate(("bf16", "nf4")))
    file = export.write(sample.comparison(cells=cells), tmp_path / "result.json")
    done = here("judge", file, "--judge", "endpoint@judge", "--model", tmp_path / "model", "--reasons")
    assert done.code == 0, done.err
    assert "Judge endpoint@judge" in done.out and "disagreed on 1 of 1 pair" in done.out
    assert "bf16: It is shorter." in done.out and "nf4: It is shorter." in done.out
    (judge,) = document.read(file).votes.judges
    assert [(j.first, j.second, j.choice) for j in judge.judgements] == [("left", "right", "tie")]
    assert "Judge endpoint@judge" in here("show", file).out
    again = here("judge", file, "--judge", "no-such-method")
    assert again.code == 2 and "no-such-method" in again.err
