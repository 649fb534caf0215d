"""A judge model: both orders, its reasons, what Stop leaves, and its agreement with people; through a real server."""

from __future__ import annotations

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import sample
import tiny_models
from openai_server import OpenAIServer
from toy_engine import ToyEngine

from comparator import api
from comparator.comparison import judge as judging
from comparator.comparison import standings
from comparator.comparison.judge import Judging, judge, pairs_to_judge, read_verdict, with_judge
from comparator.core import document
from comparator.core.errors import Stopped, UserError
from comparator.core.messages import Prompt
from comparator.core.prompt_set import SetAnswer, SetPrompt, SetResult
from comparator.core.request import DEFAULT_TEMPLATE
from comparator.core.result import CellResult
from comparator.core.settings import Settings, get_settings
from comparator.core.state import ModelFacts
from comparator.core.votes import Judge, Judgement, Vote, Votes
from comparator.engines import get_engine
from comparator.reporting import votes as words


def of_set(*columns: tuple[str, ...]):
    prompts = tuple(SetPrompt(f"p{n}", f"Question {n}?") for n in range(len(columns[0])))
    answers = tuple(tuple(SetAnswer(text, 1, "eos") for text in column) for column in columns)
    cells = tuple(CellResult(f"v{n}") for n in range(len(columns)))
    return sample.comparison(
        schema=2, cells=cells, reference=None, prompt_set=SetResult("own", prompts, answers)
    )


class Prefers:
    """A model of the server: the answer with "good" in it is better; without one it says what stands first."""

    def __init__(self, tokenizer):
        self.tokenizer, self.texts, self.reply = tokenizer, [], []

    def __call__(self, ids: list[int], step: int) -> np.ndarray:
        if step == 0:
            text = self.tokenizer.decode(ids)
            self.texts.append(text)
            a, b = ("good" in text.split(f"[Answer {side}]")[-1].split("[End")[0] for side in "AB")
            side = "A" if a >= b else "B"
            self.reply = self.tokenizer(f"Because of {side}.\nVerdict: {side}", add_special_tokens=False)[
                "input_ids"
            ]
        row = np.zeros(tiny_models.VOCABULARY, np.float32)
        row[self.reply[step] if step < len(self.reply) else self.tokenizer.eos_token_id] = 20.0
        return row


@pytest.fixture
def asking(tiny_chat, settings_env):
    """`asking(comparison, …)` → (the judge, what the server's model read, the server)."""
    tokenizer = tiny_models.tokenizer(chat=True)

    def ask(comparison, cancel=None, on_judge=judging.ignore, gives_ids=False, **options):
        reads = Prefers(tokenizer)
        with OpenAIServer(tokenizer, reads, gives_ids=gives_ids, owned_by="vllm") as server:
            settings_env(endpoints=f"judge={server.url}")
            try:
                made = judge(
                    comparison, Judging(tiny_chat, api.cell("endpoint@judge"), **options), engine=get_engine(),
                    cancel=cancel or threading.Event(), on_judge=on_judge,
                )  # fmt: skip
            finally:  # the next server has another port
                get_engine().unload()
        return made, [text for text in reads.texts if "[Answer A]" in text], server

    yield ask
    get_engine().unload()
    get_settings.cache_clear()


@pytest.mark.parametrize("gives_ids", [False, True])
def test_both_orders_and_a_tie_where_they_disagree(asking, gives_ids):
    comparison = of_set(("a good {a} one", "plain", "same"), ("other", "simple", "same"))
    made, texts, _ = asking(comparison, gives_ids=gives_ids)
    assert len(texts) == 4, "two pairs in two orders; identical answers are not judged"
    assert [(j.prompt, j.first, j.second, j.choice) for j in made.judgements] == [
        (0, "left", "left", "left"), (1, "left", "right", "tie"),
    ]  # fmt: skip
    assert made.judgements[0].reasons == ("Because of A.", "Because of B.")
    assert "Question 0?" in texts[0] and "a good {a} one" in texts[0], (
        "braces of an answer were taken for a place"
    )
    assert made.column == "endpoint@judge" and "{request}" in made.instructions


def test_a_server_gets_messages_for_its_own_template(asking):
    _, _, server = asking(of_set(("good",), ("bad",)))
    asked = [(path, body) for path, _, body in server.requests if "[Answer A]" in json.dumps(body)]
    assert len(asked) == 2 and all(path.endswith("/chat/completions") for path, _ in asked)
    assert all(body["temperature"] == 0 for _, body in asked)


def test_stop_keeps_whole_pairs_and_the_next_run_does_the_rest(asking):
    comparison = of_set(tuple(f"good {n}" for n in range(4)), tuple(f"bad {n}" for n in range(4)))
    cancel, last = threading.Event(), []

    def stop_after_two(made: Judge) -> None:
        last.append(made)
        if len(made.judgements) == 2:
            cancel.set()

    with pytest.raises(Stopped):
        asking(comparison, cancel, stop_after_two)
    kept = replace(comparison, votes=with_judge(comparison, last[-1]))
    assert len(last[-1].judgements) == 2
    made, texts, _ = asking(kept)
    assert len(texts) == 4 and len({j.prompt for j in made.judgements}) == 4, (
        "judged a pair twice, or left one out"
    )
    assert len(asking(kept, fresh=True)[1]) == 8
    again = replace(kept, votes=with_judge(kept, made))
    assert len(again.votes.judges) == 1 and document.loads(document.dumps(again)) == again


def test_what_is_too_long_for_it_has_no_verdict_and_says_so(asking, settings_env):
    comparison = of_set(("good " * 4000,), ("bad",))
    made, texts, _ = asking(comparison)
    assert (
        texts == []
        and made.judgements[0].reasons == (judging.TOO_LONG,) * 2
        and made.judgements[0].choice is None
    )
    assert words.judge_sentences(comparison, made)[0].startswith("It gave no verdict")


class Rambles(ToyEngine):
    """A column that gives no verdict by itself, and completes one with the letter of the longer answer."""

    def encode(self, model, prompt, system, chat, template=DEFAULT_TEMPLATE):
        text = prompt if chat is False else f"<user>{prompt}<assistant>"
        return Prompt(tuple(range(len(prompt.split()))), chat is not False, text=text)

    def generate(self, handle, prompt, settings, cancel, on_chunk=None, *, adapter=None):
        made = super().generate(handle, prompt, settings, cancel, adapter=adapter)
        if not prompt.text.endswith("Verdict:"):
            return replace(made, text="Both have their merits.\n")
        assert (
            prompt.text.endswith("<assistant>Both have their merits.\nVerdict:")
            and settings.max_new_tokens < 10
        )
        a, b = (prompt.text.split(f"[Answer {side}]")[1].split("[End")[0] for side in "AB")
        return replace(made, text=" A" if len(a) > len(b) else " B")


def test_a_column_without_a_verdict_is_asked_to_complete_one():
    comparison = of_set(("a long answer",), ("short",))
    engine = Rambles(Settings())
    engine.facts = lambda model: ModelFacts(model, context_length=4096)
    made = judge(comparison, Judging("toy", api.cell("bf16")), engine=engine, cancel=threading.Event())
    assert [(j.first, j.second, j.choice) for j in made.judgements] == [("left", "left", "left")]
    assert made.judgements[0].reasons == ("Both have their merits.",) * 2


def test_nothing_to_judge_is_refused_before_anything_is_loaded(asking):
    with pytest.raises(UserError, match="no pair"):
        asking(of_set(("same",), ("same",)))


def test_pairs_are_spread_over_prompts_and_columns():
    comparison = of_set(*(tuple(f"{column}{n}" for n in range(6)) for column in "abc"))
    pairs = pairs_to_judge(comparison, 6)
    assert sorted(p[0] for p in pairs) == list(range(6))
    assert sorted(p[1:] for p in pairs) == [(0, 1), (0, 1), (0, 2), (0, 2), (1, 2), (1, 2)]
    assert len(set(pairs_to_judge(comparison, 100))) == 18


@pytest.mark.parametrize(
    ("text", "verdict", "reason"),
    [
        ("A is right.\nVerdict: A", "a", "A is right."), ("**Verdict:** B", "b", ""), ("Both.\nverdict - TIE.", "tie", "Both."),
        ("First verdict: A would be wrong.\nVerdict: B", "b", "First verdict: A would be wrong."), ("Answer B", "b", ""),
        ("So:\nB.", "b", "So:"), ("A good question.", None, "A good question."), ("", None, ""), ("Verdict: Apples", None, "Verdict: Apples"),
    ],
)  # fmt: skip
def test_verdicts_are_read_from_what_judges_write(text, verdict, reason):
    assert read_verdict(text) == (verdict, reason)
    assert len(read_verdict("why " * 500)[1]) == judging.LONGEST_REASON


def test_agreement_with_the_human_votes():
    comparison = of_set(tuple("abcd"), tuple("wxyz"))
    judgements = (
        Judgement(0, 0, 1, "left", "left"), Judgement(1, 0, 1, "left", "right"), Judgement(2, 0, 1, "right", "right"),
        Judgement(3, 0, 1, None, "left"),
    )  # fmt: skip
    one = Judge("model", "bf16", "…", judgements)
    votes = (
        Vote(0, 1, 0, "right", "a"), Vote(1, 0, 1, "bad", "a"), Vote(2, 0, 1, "left", "a"), Vote(2, 1, 0, "left", "b"),
        Vote(3, 0, 1, "left", "a"),
    )  # fmt: skip
    voted = replace(comparison, votes=Votes(votes, judges=(one,)))
    found = standings.agreement(voted, one)
    assert (found.votes, found.same) == (4, 3), "the pair without a verdict counts nowhere"
    # Of people: lower, tie, lower, higher; of the judge: lower, tie, higher, higher. Chance agrees on 2/16 + 1/16 + 2/16.
    assert found.kappa == pytest.approx((3 / 4 - 5 / 16) / (1 - 5 / 16))
    assert standings.agreement(comparison, one) is None
    assert [s.votes for s in standings.judge_standings(voted, one)] == [3, 3]
    text = " ".join(words.judge_sentences(voted, one))
    assert "disagreed on 1 of 3 pairs" in text and "3 of 4 human votes" in text and "kappa 0.64" in text
    assert words.reason_rows(voted, one)[3][3] == "no verdict"


def test_older_judges_make_way():
    comparison = of_set(("a",), ("b",))
    for n in range(judging.MOST_JUDGES + 2):
        made = Judge("model", f"nf4:skip={n}", "…", (Judgement(0, 0, 1, "left", "left"),))
        comparison = replace(comparison, votes=with_judge(comparison, made))
    assert len(comparison.votes.judges) == judging.MOST_JUDGES
    assert document.loads(document.dumps(comparison)) == comparison
