"""What servers send, in each of their ways of writing it, and what none should send."""

from __future__ import annotations

import functools
import math

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st

from comparator.core.endpoints import Endpoint
from comparator.core.errors import UserError
from comparator.runtimes.endpoint import reading
from comparator.runtimes.endpoint.reading import Answer, Vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_models.tokenizer()


def test_the_three_ways_of_writing_log_probabilities_mean_the_same(tokenizer):
    paris, the = (tokenizer.convert_tokens_to_ids(t) for t in ("1", "2"))
    by_text = {
        "content": [
            {
                "token": "1",
                "logprob": -0.5,
                "top_logprobs": [{"token": "1", "logprob": -0.5}, {"token": "2", "logprob": -1.5}],
            }
        ]
    }
    by_id = {
        "content": [
            {
                "id": paris,
                "token": "?",
                "logprob": -0.5,
                "top_logprobs": [{"id": the, "token": "?", "logprob": -1.5}],
            }
        ]
    }
    vllm = {
        "tokens": [f"token_id:{paris}"],
        "token_logprobs": [-0.5],
        "top_logprobs": [{f"token_id:{paris}": -0.5, f"token_id:{the}": -1.5}],
    }
    for written in (by_text, by_id, vllm):
        (position,) = Vocabulary(tokenizer).choices({"logprobs": written})
        assert (position.first, position.log_p) == (paris, {paris: -0.5, the: -1.5}), written


def test_an_answer_that_the_server_gave_up_has_no_end(tokenizer):
    answer = Answer(tokenizer)
    answer.add(1.0, {"choices": [{"text": "The", "finish_reason": "abort"}]})
    with pytest.raises(UserError, match="in the middle"):
        answer.require_end(Endpoint("vllm", "http://host/v1"))
    answer.add(2.0, {"choices": [{"text": " dog", "finish_reason": "stop"}]})
    answer.require_end(Endpoint("vllm", "http://host/v1"))
    assert answer.finish == "eos" and answer.ids[-1] == tokenizer.eos_token_id


def test_a_text_that_several_tokens_have_names_none(tokenizer):
    broken = tokenizer.decode([tokenizer.convert_tokens_to_ids("Ã")])
    assert broken == "�", "this token has to be a part of a character"
    known = Vocabulary(tokenizer)
    assert known.id_of({"token": broken}) is None
    (position,) = known.choices({"logprobs": {"content": [{"token": broken, "logprob": -0.1}]}})
    assert position is None


def test_thinking_that_is_sent_apart_is_part_of_the_text(tokenizer):
    answer = Answer(tokenizer)
    answer.add(1.0, {})
    for at_s, delta in ((2.0, {"reasoning_content": "The "}), (3.0, {"content": "dog"}), (4.0, {})):
        answer.add(at_s, {"choices": [{"delta": delta, "finish_reason": "length" if at_s == 4.0 else None}]})
    assert (answer.text, answer.start_s, answer.finish) == ("The dog", 1.0, "length")
    assert len(answer.ids) == len(answer.times_s) and answer.times_s == sorted(answer.times_s)
    assert tokenizer.decode(answer.ids) == "The dog"


made_once = functools.cache(tiny_models.tokenizer)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["choices", "text", "delta", "message", "content", "token_ids", "logprobs", "top_logprobs", "tokens",
                         "token_logprobs", "token", "id", "logprob", "finish_reason", "usage", "prompt_tokens",
                         "prompt_tokens_details", "cached_tokens"]),  # fmt: skip
        inner, max_size=4,
    ),
    max_leaves=12,
)  # fmt: skip


@given(json_values)
@settings(max_examples=300, deadline=None)
def test_any_json_is_read_without_harm(value):
    tokenizer = made_once()
    piece = value if isinstance(value, dict) else {"choices": [value]}
    answer = Answer(tokenizer)
    answer.add(1.0, piece)
    assert all(isinstance(i, int) and i >= 0 for i in answer.ids) and len(answer.ids) == len(answer.times_s)
    for position in Vocabulary(tokenizer).choices(reading.choice_of(piece)):
        assert position is None or all(math.isfinite(p) and p <= 0 for p in position.log_p.values())
