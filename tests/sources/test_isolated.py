"""Strangers' checkpoints on a public server: opened and tokenized with in a process that the kernel bounds.

The attacks run in the real process with limits that are small beside what they would take: without them one of these
prompts takes the machine's memory, another minutes.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import tiny_models

from comparator.core.errors import Stopped, UserError
from comparator.sources import folder, isolated, tokenizer
from comparator.util import streams

COMMIT = "a" * 40
ASCII = "".join(chr(n) for n in range(32, 127))


@pytest.fixture
def public(own_dirs, monkeypatch):
    monkeypatch.setenv("COMPARATOR_PUBLIC", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_operator")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "model"
    tiny_models.save(path, "llama")
    return path


def checkpoint(path: Path):
    return folder.inspect(path, "someone/model", revision=COMMIT)


def changed(plain: Path, to: Path, **changes) -> Path:
    """A copy whose tokenizer.json is changed."""
    shutil.copytree(plain, to)
    file = to / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return to


def test_the_tokenizer_of_another_process_answers_as_ones_own(public, plain):
    here, there = tokenizer.own_tokenizer(checkpoint(plain)), tokenizer.load_tokenizer(checkpoint(plain))
    assert isinstance(there, isolated.IsolatedTokenizer)
    for options in ({}, {"add_special_tokens": False, "verbose": False}):
        ids = here(ASCII, **options)["input_ids"]
        assert there(ASCII, **options)["input_ids"] == ids
        assert there.decode(ids, skip_special_tokens=True) == here.decode(ids, skip_special_tokens=True)
    assert there.get_vocab() == here.get_vocab() and len(there) == len(here)
    for name in ("chat_template", "bos_token_id", "eos_token_id", "eos_token", "pad_token_id", "bos_token"):
        assert getattr(there, name) == getattr(here, name), name
    assert there.special_tokens_map == {k: str(v) for k, v in here.special_tokens_map.items()}


def test_only_strangers_are_kept_apart(own_dirs, plain, monkeypatch):
    assert not isinstance(tokenizer.load_tokenizer(checkpoint(plain)), isolated.IsolatedTokenizer)
    monkeypatch.setenv("COMPARATOR_PUBLIC", "1")
    own = folder.inspect(plain, "operator's folder")
    assert not isinstance(tokenizer.load_tokenizer(own), isolated.IsolatedTokenizer)


def test_a_checkpoint_is_opened_there_once(public, plain, monkeypatch):
    said, questions = [], []
    asked = isolated.process.ask
    monkeypatch.setattr(isolated.process, "ask", lambda line, *a: questions.append(line) or asked(line, *a))
    for _ in range(2):
        isolated.open_first(plain, "someone/model", lambda fraction, message: said.append(message))
    assert len(questions) == 1 and "someone/model" in said[0] and isolated.was_opened(plain)


@pytest.mark.slow
def test_rules_that_make_ten_characters_of_one_end_at_the_memory_limit(public, plain, tmp_path, monkeypatch):
    rule = {"type": "Replace", "pattern": {"String": "€"}, "content": "€" * 10}
    bomb = changed(plain, tmp_path / "bomb", normalizer={"type": "Sequence", "normalizers": [rule] * 12})
    monkeypatch.setattr(isolated, "BYTES", 500_000_000)
    isolated.process.close()
    try:
        with pytest.raises(UserError, match="someone/model takes more than 0.5 GB of memory"):
            tokenizer.load_tokenizer(checkpoint(bomb))("1 €")
        # and the next visitor's model has a new process
        assert tokenizer.load_tokenizer(checkpoint(plain))("Hello")["input_ids"]
    finally:
        isolated.process.close()


@pytest.mark.slow
def test_what_takes_too_long_is_ended(public, plain, monkeypatch):
    there = tokenizer.load_tokenizer(checkpoint(plain))
    child = isolated.process.child
    monkeypatch.setattr(isolated, "CALL_S", 0.0)
    with pytest.raises(UserError, match="takes longer than"):
        there("Hello " * 200_000)
    assert child.poll() is not None, "the process goes on with what nobody waits for"


def test_a_pattern_without_end_is_a_problem_of_that_model(public, plain, tmp_path):
    rule = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    there = tokenizer.load_tokenizer(checkpoint(changed(plain, tmp_path / "pattern", pre_tokenizer=rule)))
    began_s = time.monotonic()
    with pytest.raises(UserError, match="tokenizer fails"):
        there("x" * 100_000)
    assert time.monotonic() - began_s < isolated.CALL_S
    assert there("Hello")["input_ids"], "the process did not outlive it"


@pytest.mark.parametrize(
    ("changes", "match"),
    (
        ({"num_hidden_layers": 4000, "layer_types": None}, "layer"),
        ({"vocab_size": 20_000_000}, "vocab|embed"),
    ),
)
def test_a_config_that_promises_more_than_the_file_has_is_refused(public, plain, tmp_path, changes, match):
    path = tmp_path / "model"
    shutil.copytree(plain, path)
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(UserError, match=match):
        isolated.open_first(path, "someone/model", lambda fraction, message: None)
    assert not isolated.was_opened(path)


def test_stop_ends_the_opening(public, plain):
    def stop(fraction, message):
        raise Stopped

    with pytest.raises(Stopped):
        isolated.open_first(plain, "someone/model", stop)


def test_the_process_knows_no_token(public, plain):
    tokenizer.load_tokenizer(checkpoint(plain))
    there = Path(f"/proc/{isolated.process.child.pid}/environ").read_bytes()
    assert b"hf_of_the_operator" not in there and b"HF_HUB_OFFLINE=1" in there


def test_computing_is_what_is_limited_not_the_clock(public, plain, tmp_path, monkeypatch):
    """Rules that double a character, within the limit of memory: minutes of computing for a page of text."""
    rule = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    slow = changed(plain, tmp_path / "slow", normalizer={"type": "Sequence", "normalizers": [rule] * 13})
    there = tokenizer.load_tokenizer(checkpoint(slow))
    began_s = time.process_time()
    with monkeypatch.context() as limits, pytest.raises(UserError, match="longer than 1 s of computing"):
        limits.setattr(isolated, "CALL_CPU_S", 1)
        there("e " * 10_000)
    assert time.process_time() - began_s < 2, "this process computed with it"
    assert tokenizer.load_tokenizer(checkpoint(plain))("Hello")["input_ids"]


def test_a_tokenizer_of_nested_lists_ends_the_opening_alone(public, plain, tmp_path):
    path = tmp_path / "nested"
    shutil.copytree(plain, path)
    (path / "tokenizer.json").write_text("[" * 5_000_000 + "]" * 5_000_000)
    began_s = time.process_time()
    with pytest.raises(UserError):
        isolated.open_first(path, "someone/model", lambda fraction, message: None)
    assert time.process_time() - began_s < 2 and not isolated.was_opened(path)


def test_who_waits_for_others_questions_can_stop(public, plain, tmp_path):
    """One process answers everybody: a question of somebody else's is no reason not to hear Stop."""
    rule = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
    slow = changed(plain, tmp_path / "slow", normalizer={"type": "Sequence", "normalizers": [rule] * 13})
    there = tokenizer.load_tokenizer(checkpoint(slow))
    others = streams.in_thread(lambda: there("e " * 10_000))
    while not isolated.process._lock.locked():
        time.sleep(0.01)

    def stop() -> None:
        raise Stopped

    with pytest.raises(Stopped):
        isolated.process.ask(b"{}", 60.0, stop)
    assert not others.done()
    isolated.process.child.kill()
    with pytest.raises(UserError):
        others.result()
