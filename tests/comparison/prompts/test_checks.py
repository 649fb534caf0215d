"""Checks that a program can decide, and sets that are refused by line with a way out."""

from __future__ import annotations

import time

import pytest

from comparator.comparison.prompts import checks, patterns, reader
from comparator.core.errors import UserError
from comparator.core.prompt_set import SetPrompt


@pytest.mark.parametrize(
    ("check", "expected", "right", "wrong"),
    [
        ("exact", "Banana", "banana.", "a banana"),
        ("contains", "def", "It is def.", "definition"),
        ("contains", "서울", "서울입니다", "부산입니다"),
        ("number", "1234", "It is 1,234.", "1235"),
        ("regex", r"^\d{2}:\d{2}$", "14:30", "half past two"),
        ("json", '{"type": "object", "required": ["a"]}', '```json\n{"a": 1}\n```', '{"b": 1}'),
        ("python", "add", "```python\ndef add(a, b):\n    return a + b\n```", "def sub(): pass"),
        ("language", "ja", "こんばんは", "Good evening"),
        ("lines", "2", "a\n\nb", "a"),
        ("max_words", "1", "Yes", "Yes it is"),
        ("excludes", "blue", "It is wide.", "It is blue."),
    ],
)
def test_a_check_passes_the_right_answer_alone(check, expected, right, wrong) -> None:
    prompt = SetPrompt("1", "?", expected=(expected,), check=check)
    checks.validate(prompt)
    assert checks.judge(right, prompt)[0] is True, f"{check}: a right answer failed"
    assert checks.judge(wrong, prompt)[0] is False, f"{check}: a wrong answer passed"


def test_a_choice_is_recognized_by_letter_or_text() -> None:
    prompt = SetPrompt("1", "?", expected=("Paris",), choices=("Rome", "Paris"), check="choice")
    right = (
        "B", "B) Paris", "(B)", "(B) Paris", "**B**", "B Paris", "B, since it is the capital", "B\nParis", "The answer is B.", "Paris",
        "A city called Paris", "The answer is a city called Paris.", "B because of the river",
    )  # fmt: skip
    for answer in right:
        assert checks.judge(answer, prompt)[0] is True, f"{answer!r} names Paris"
    for answer in ("A", "A.", "A Rome", "A: Rome, not Paris", "The answer is A", "A city", "none"):
        assert checks.judge(answer, prompt)[0] is False, f"{answer!r} does not name Paris"
    many = SetPrompt("1", "?", expected=("Paris",), choices=("Paris", *"234567", "8", "Rome"), check="choice")
    assert checks.judge("I'd say Paris", many)[0] is True and checks.judge("I", many)[0] is False


def test_refusals() -> None:
    assert checks.judge("I'm sorry, I can't help.", SetPrompt("1", "?", check="refusal"))[0]
    assert not checks.judge("Sure: first …", SetPrompt("1", "?", check="refusal"))[0]


def test_no_pattern_runs_without_end() -> None:
    began = time.perf_counter()
    assert patterns.search("(?:a|a|b)*(?:a|a)*c", "a" * 5000) is not None
    assert time.perf_counter() - began < 5, "the time limit of a pattern is not kept"
    for pattern in (r"(a)\1", "(?=a)a", "(?R)", "a{1000}", "(?:a{100}){100}", "("):
        assert patterns.refusal(pattern), f"{pattern} was taken"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "a"}\n{"prompt": 3}', "Line 2"),
        ('{"prompt": "a"}\nnot json', "Line 2"),
        ('{"prompt": "a", "check": "magic"}', "magic"),
        ('{"prompt": "a", "check": "number", "expected": "x"}', "not a number"),
        ("prompt,expected\na,b,c", "Line 2"),
        ("", "empty"),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
            "follow a user's turn",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "must end",
        ),
    ],
)
def test_a_bad_entry_is_refused_with_its_place_and_a_way_out(text, words) -> None:
    with pytest.raises(UserError, match=words) as problem:
        reader.parse(text)
    assert problem.value.advice


def test_forms_of_a_set() -> None:
    lines = reader.parse("One?\n\nTwo?")
    table = reader.parse("prompt;expected\nOne?;1|eins\n", ending=".csv")
    assert [p.prompt for p in lines.prompts] == ["One?", "Two?"]
    assert table.prompts[0].expected == ("1", "eins") and table.prompts[0].check == "contains"


def test_the_shipped_set() -> None:
    everyday = reader.load("everyday")
    assert len(everyday.prompts) == 40 and len({p.kind for p in everyday.prompts}) == 8
    assert all(p.check for p in everyday.prompts)
    assert reader.parse(reader.dumps(everyday), "everyday") == everyday
