"""Word-level differences: nothing is lost, and what differs is what is marked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from comparator.ui.text_diff import changed_words, differences, split_words

TEXTS = st.text(alphabet=st.sampled_from("ab é,. \n漢"), max_size=60)


@given(TEXTS, TEXTS)
def test_the_pieces_are_the_text_again(text, reference):
    pieces = differences(text, reference)
    assert "".join(p.text for p in pieces) == text
    theirs = "".join(p.text if p.kind == "same" else p.other for p in pieces)
    assert theirs == reference, "same, replaced and missing pieces together are the reference"


@given(TEXTS)
def test_a_text_does_not_differ_from_itself(text):
    assert all(p.kind == "same" for p in differences(text, text))


def test_a_replaced_word_is_one_change():
    pieces = differences("the cat sat", "the dog sat")
    assert [(p.kind, p.text, p.other) for p in pieces if p.kind != "same"] == [("changed", "cat", "dog")]
    assert changed_words(pieces) == (1, 3)


def test_a_missing_word_leaves_a_gap():
    pieces = differences("the sat", "the cat sat")
    assert "missing" in {p.kind for p in pieces} and changed_words(pieces) == (0, 2)


def test_words_are_whole():
    assert split_words("Don't stop, Zoë!") == ["Don", "'", "t", " ", "stop", ",", " ", "Zoë", "!"]
