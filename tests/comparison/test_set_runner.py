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
    with pytest.raises(UserError, match="one per variant and prompt"):
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


TALK = """{"id": "given", "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "My name is Ann."},
 {"role": "assistant", "content": "Hello Ann."}, {"role": "user", "content": "What is my name?"}], "expected": "Ann"}
{"id": "own", "messages": [{"role": "user", "content": "Name a colour."}, {"role": "user", "content": "And another one."},
 {"role": "user", "content": "Which was the first?"}]}""".replace(",\n ", ", ")


def test_a_conversation_is_context_and_a_script_gets_the_columns_own_answers(
    engine, request_, two_layers
) -> None:
    from transformers import AutoTokenizer

    from comparator.core.messages import Prompt

    prompts = reader.parse(TALK)
    given, own = prompts.prompts
    assert (given.own_turns, own.own_turns, len(given.history)) == (0, 2, 2)
    assert reader.parse(reader.dumps(prompts)).prompts == prompts.prompts
    asked = replace(request_, prompts=prompts, prompt=given.prompt, resume=False)
    comparison = runner.run(asked, engine=engine, emit=lambda event: None)
    answers = comparison.prompt_set.answers
    assert comparison.cells[0].text == answers[0][0].text, "the rounds answer another conversation"
    assert [len(a.earlier) for column in answers for a in column] == [0, 2, 0, 2]
    assert answers[1][1].kl is not None and answers[1][1].compared == answers[0][1].tokens
    assert document.loads(document.dumps(comparison)) == comparison
    assert answers[1][1].earlier[0][:20] in export.render(comparison, "a.html").replace("&#39;", "'")

    tokenizer = AutoTokenizer.from_pretrained(two_layers)

    def says(column: int, messages: list[dict]) -> str:
        """What plain transformers' template and one more run of the column make of a conversation."""
        cell = comparison.cells[column]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = Prompt(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), True)
        handle = engine.handle_of(comparison.model, cell.variant)
        return engine.generate(handle, ids, asked.settings, threading.Event()).text

    for column, (first, second) in enumerate(answers):
        before = [
            {"role": "system", "content": "Be short."},
            *({"role": m.role, "content": m.content} for m in given.history),
        ]
        assert first.text == says(column, [*before, {"role": "user", "content": given.prompt}])
        talk = []
        for turn, said in zip(
            [m.content for m in own.history] + [own.prompt], [*second.earlier, second.text], strict=True
        ):
            talk.append({"role": "user", "content": turn})
            assert said == says(column, talk), "a turn did not follow the column's own answers"
            talk.append({"role": "assistant", "content": said})


def test_a_scripted_conversation_resumes_with_the_references_own_turns(engine, request_) -> None:
    asked = replace(request_, prompts=reader.parse(TALK), prompt="My name is Ann.")
    cancel = threading.Event()

    def stop(event) -> None:  # once the reference has answered the last prompt
        if isinstance(event, Answering) and event.number == 2 and event.cell.variant.notation == "nf4":
            cancel.set()

    part = runner.run(asked, engine=engine, emit=stop, cancel=cancel).prompt_set
    assert part.answers[0][1] is not None and part.answers[1][1] is None
    whole = runner.run(asked, engine=engine, emit=lambda event: None).prompt_set
    fresh = runner.run(replace(asked, resume=False), engine=engine, emit=lambda event: None).prompt_set
    assert whole.resumed == 3 and whole.answers == fresh.answers
