"""Prompt → ids and ids → text with the real tokenizer."""

from __future__ import annotations

import pytest

from comparator.core.errors import UserError
from comparator.decoding.text import TextStream, encode


@pytest.fixture(scope="module")
def tokenizer(builtin):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(builtin.path)


@pytest.mark.parametrize(
    "text",
    [
        "Hello world.",
        "안녕하세요, 세계!",
        "日本語のテキスト",
        "🏴‍☠️ Arr 🦜!",
        "  indented\n\n\tcode()",
        "a" * 300,
        "naïve café – “quotes”",
    ],
)
def test_pieces_add_up(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    rest, whole = stream.finish()
    assert "".join(pieces) + rest == whole == tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("\ufffd" in p for p in pieces), "half a character was shown"


def test_chat_template_by_default_and_not_when_raw(tokenizer):
    chat, raw = encode(tokenizer, "Hi", "Be brief.", None), encode(tokenizer, "Hi", None, False)
    assert chat.chat and not raw.chat and len(chat.token_ids) > len(raw.token_ids)
    assert "Be brief." in tokenizer.decode(chat.token_ids)


def test_without_a_template(tokenizer):
    import copy

    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    assert encode(bare, "Hi", None, None).chat is False
    assert bare.decode(encode(bare, "Hi", "Be brief.", None).token_ids).startswith("Be brief.\n\nHi")
    with pytest.raises(UserError, match="no chat template"):
        encode(bare, "Hi", None, True)


def test_a_template_that_refuses_says_so(tokenizer):
    import copy

    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}hi"
    )
    with pytest.raises(UserError, match="no system role"):
        encode(strict, "Hi", "Be brief.", None)


def test_empty(tokenizer):
    with pytest.raises(UserError, match="empty"):
        encode(tokenizer, " \n", None, None)
