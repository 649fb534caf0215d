"""A prompt set through columns of the model with two layers: the document, what it says, and Stop."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from comparator.backends import resolve
from comparator.comparison import runner
from comparator.comparison.prompts import reader
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.events import Answering
from comparator.core.request import GenerationSettings, Request
from comparator.core.settings import Settings
from comparator.core.variant import Cell
from comparator.engine.local import LocalEngine
from comparator.reporting import export, prompt_set

SET = '{"prompt": "What is 2 + 2?", "check": "number", "expected": 4}\n{"prompt": "Hello"}\n{"prompt": "Say hi", "check": "answers"}'


@pytest.fixture(scope="module")
def engine():
    engine = LocalEngine(Settings(max_new_tokens=64))
    yield engine
    engine.unload()


@pytest.fixture(scope="module")
def request_(two_layers) -> Request:
    prompts = reader.parse(SET)
    return Request(
        str(two_layers), tuple(Cell(resolve(v)) for v in ("bf16", "nf4")), prompts.prompts[0].text, prompts=prompts,
        settings=GenerationSettings(max_new_tokens=4, repeats=1),
    )  # fmt: skip


def test_a_set_is_measured_and_written(engine, request_) -> None:
    comparison = runner.run(request_, engine=engine, emit=lambda event: None)
    result = comparison.prompt_set
    assert result is not None and comparison.schema == 2, "the set did not reach the document"
    assert all(a is not None and a.error is None for column in result.answers for a in column)
    bf16, nf4 = result.answers
    assert bf16[0].text == comparison.cells[0].text, (
        "the set decodes the first prompt otherwise than its rounds do"
    )
    assert nf4[0].kl is not None and nf4[0].kl > 0 and bf16[0].kl is None
    assert bf16[1].passed is None and bf16[2].passed is not None
    assert document.loads(document.dumps(comparison)) == comparison
    assert len(export.render(comparison, "a.prompts.csv").splitlines()) >= 7
    reference, other = prompt_set.summaries(comparison)
    assert reference.worse is None and other.checked == 2 and other.p is not None
    assert len(list(prompt_set.rows(comparison))) == 3


def test_stop_keeps_the_prompts_that_are_done(engine, request_) -> None:
    cancel = threading.Event()

    def stop(event) -> None:
        if isinstance(event, Answering) and event.number == 2:
            cancel.set()

    result = runner.run(request_, engine=engine, emit=stop, cancel=cancel).prompt_set
    assert result is not None
    assert [[a is not None for a in column] for column in result.answers] == [[True, False, False]] * 2


def test_answers_that_do_not_fit_the_set_are_refused(engine, request_) -> None:
    text = document.dumps(runner.run(request_, engine=engine, emit=lambda event: None))
    with pytest.raises(UserError, match="one per column and prompt"):
        document.loads(text.replace('"answers":[[', '"answers":[[null,', 1))


def test_a_batch_answers_as_one_by_one(engine, request_) -> None:
    one = runner.run(replace(request_, resume=False), engine=engine, emit=lambda event: None).prompt_set
    many = runner.run(
        replace(request_, batch=3, resume=False), engine=engine, emit=lambda event: None
    ).prompt_set
    assert many.batch == 3 and many.answers[1][0].kl is not None
    for alone, together in zip(one.answers, many.answers, strict=True):
        for a, b in zip(alone, together, strict=True):
            assert a.text == b.text or b.near_tie is not None, (
                "another answer in a batch, and it is not named"
            )
            assert b.kl is None or abs(a.kl - b.kl) < 0.02 or a.text != b.text
