"""Reading data: what is recognized, what is masked, and what each kind of bad data says."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tiny_models

from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.training import data, targets, tokenize
from comparator.training.settings import TrainSettings
from comparator.training.types import DataSource

GIVEN = TrainSettings(max_length=128)


@pytest.fixture(scope="module")
def tokenizer(builtin):
    return tokenize.load_tokenizer(builtin)


def read(tmp_path, content, name="data.jsonl", **source):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return data.read(DataSource(str(file), name=name, **source))


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]


@pytest.mark.parametrize(
    ("content", "name", "form", "columns"),
    [
        (lines({"messages": CHAT}), "a.jsonl", "chat", {"messages": "messages"}),
        (lines({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]}), "a.jsonl",
         "chat", {"messages": "conversations"}),
        (lines({"Question": "a", "Answer": "b"}), "a.jsonl", "prompt", {"prompt": "Question", "completion": "Answer"}),
        (lines({"instruction": "a", "input": "b", "output": "c"}), "a.jsonl", "prompt",
         {"prompt": "instruction", "completion": "output", "context": "input"}),
        (json.dumps([{"text": "a"}]), "a.json", "text", {"text": "text"}),
        ("﻿prompt;completion;id\r\n\"one;\ntwo\";yes;1\r\n", "a.csv", "prompt", {"prompt": "prompt", "completion": "completion"}),
        ("poem\nRoses are red\n", "a.csv", "text", {"text": "poem"}),
    ],
)  # fmt: skip
def test_columns_are_recognized(tmp_path, content, name, form, columns):
    found = read(tmp_path, content, name)
    assert (found.form, dict(found.columns), len(found.samples)) == (form, columns, 1)


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        (lines({"a": 1, "b": 2}), "a.jsonl", "“a”, “b”"),
        (b'{"text": "caf\xe9"}\n', "a.jsonl", "not UTF-8: line 1, byte 13"),
        ("", "a.jsonl", "is empty"),
        ("[]", "a.json", "contains no samples"),
        ("prompt,completion\n", "a.csv", "contains no samples"),
        (lines({"prompt": "", "completion": "x"}, {"prompt": "y", "completion": " "}), "a.jsonl", "None of the 2 rows"),
        ('{"text": "a"}\n{"text": \n', "a.jsonl", "Line 2"),
        ("[1, 2]\n", "a.jsonl", "must be an object"),
        (lines({"text": "a"}), "a.xlsx", ".xlsx"),
    ],
)  # fmt: skip
def test_bad_data_says_what_is_wrong(tmp_path, content, name, said):
    with pytest.raises(UserError) as raised:
        read(tmp_path, content, name)
    assert said in raised.value.problem, raised.value.problem
    assert raised.value.advice


def test_other_names_can_be_told(tmp_path):
    row = lines({"frage": "a", "antwort": "b"})
    found = read(tmp_path, row, columns=(("prompt", "frage"), ("completion", "antwort")))
    assert found.samples[0] == {"row": 1, "prompt": "a", "completion": "b"}
    with pytest.raises(UserError, match="no column “fragen”"):
        read(tmp_path, row, columns=(("prompt", "fragen"),))


def test_the_fingerprint_is_of_the_samples_not_of_the_file(tmp_path):
    one = read(tmp_path, lines({"prompt": "a", "completion": "b", "id": 1}))
    two = read(tmp_path, "prompt,completion\na,b\n", "b.csv")
    other = read(tmp_path, lines({"prompt": "a", "completion": "c"}))
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_empty_rows_are_left_out_and_said(tmp_path, tokenizer):
    found = read(
        tmp_path,
        lines({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": ""}, {"prompt": "d"}),
    )
    corpus = tokenize.encode(found, tokenizer, replace(GIVEN, held_back=0.0))
    assert len(corpus.train) == 1
    assert corpus.skipped == ((2, "its completion is empty"), (3, "it has no completion"))


def test_only_what_the_assistant_says_is_learnt(tmp_path, tokenizer):
    """Every turn of it, its end-of-turn token included; the prompt has the ids that it has when it is asked."""
    talk = [*CHAT, {"role": "user", "content": "More"}, {"role": "assistant", "content": "No"}]
    found = read(tmp_path, lines({"messages": talk}))
    made = tokenize.encode_sample(found.samples[0], tokenizer, GIVEN, None)
    trained = [i for i, label in zip(made.ids, made.labels, strict=True) if label != tokenize.MASKED]
    assert tokenizer.decode(trained) == "Yo<|im_end|>No<|im_end|>"
    asked = tokenizer.apply_chat_template(talk[:3], add_generation_prompt=True, tokenize=False)
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert list(made.ids[: len(ids)]) == ids
    whole = tokenize.encode_sample(found.samples[0], tokenizer, replace(GIVEN, completion_only=False), None)
    assert tokenize.MASKED not in whole.labels


def test_the_preview_is_what_the_collator_gives_the_model(tmp_path, tokenizer):
    trl = pytest.importorskip("trl.trainer.sft_trainer")
    read_ = data.read(DataSource("pirate"))
    corpus = tokenize.encode(read_, tokenizer, GIVEN)
    shown = tokenize.preview(read_, corpus, tokenizer, GIVEN)
    assert len(shown.samples) == 5
    from comparator.training.trainer import dataset

    by_row = {e.row: e for e in corpus.all}
    batch = trl.DataCollatorForLanguageModeling(pad_token_id=0)(
        list(dataset(tuple(by_row[s.row] for s in shown.samples)))
    )
    for sample, ids, labels, mask in zip(
        shown.samples, batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    ):
        real = ids[mask == 1]
        assert tokenizer.decode(real) == "".join(p.text for p in sample.pieces)
        greyed = "".join(p.text for p in sample.pieces if not p.is_target)
        assert tokenizer.decode(real[labels[mask == 1] == -100]) == greyed
        assert "Arr, matey" not in greyed and greyed.endswith("<|im_start|>assistant\n")


def test_a_huge_row_is_cut_and_said(tmp_path, tokenizer):
    found = read(tmp_path, lines({"text": "word " * 100_000}, {"text": "short"}))
    shown = tokenize.preview(found, tokenize.encode(found, tokenizer, GIVEN), tokenizer, GIVEN)
    assert shown.tokens.maximum > 100_000 and shown.tokens.over_length == 1
    assert shown.long == ((1, shown.tokens.maximum),)
    assert max(s.tokens for s in shown.samples) == 128


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, "no answer"),
        ({"prompt": "word " * 500, "completion": "x"}, "fills the 128 tokens"),
    ],
)
def test_data_that_is_all_masked_is_refused(tmp_path, tokenizer, row, said):
    with pytest.raises(UserError, match="all 1 samples are masked") as raised:
        tokenize.encode(read(tmp_path, lines(row)), tokenizer, GIVEN)
    assert said in raised.value.problem


def test_held_back_rows_are_the_same_for_a_seed_and_never_trained_on(tokenizer):
    read_ = data.read(DataSource("pirate"))
    one, two = (tokenize.encode(read_, tokenizer, replace(GIVEN, held_back=0.25)) for _ in range(2))
    other = tokenize.encode(read_, tokenizer, replace(GIVEN, held_back=0.25, seed=1))
    rows = [e.row for e in one.heldout]
    assert len(rows) == 8 and rows == [e.row for e in two.heldout] != [e.row for e in other.heldout]
    assert not set(rows) & {e.row for e in one.train}


def test_a_model_without_a_template_takes_plain_prompts_only(tmp_path):
    tokenizer = tiny_models.tokenizer()
    made = tokenize.encode_sample(
        {"row": 1, "prompt": "What? ", "completion": "Paris."}, tokenizer, GIVEN, None
    )
    assert tokenizer.decode([t for t in made.labels if t >= 0]) == "Paris.</s>"
    with pytest.raises(UserError, match="no chat template"):
        tokenize.encode_sample({"row": 1, "messages": CHAT}, tokenizer, GIVEN, None)


def test_a_module_that_is_not_there_names_the_nearest(builtin):
    names = tuple(t.name for t in targets.in_checkpoint(builtin))
    assert set(names) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    with pytest.raises(UserError, match="no module “q_prj”") as raised:
        targets.select(TrainSettings(target_modules=("q_prj",)), names, "it")
    assert "Did you mean q_proj" in raised.value.advice
    with pytest.raises(UserError, match="lm_head cannot be a target"):
        targets.select(TrainSettings(target_modules=("lm_head",)), names, "it")


def test_in_public_a_hub_name_opens_no_folder_of_the_server(tmp_path, monkeypatch, settings_env):
    (tmp_path / "private" / "notes").mkdir(parents=True)
    (tmp_path / "private" / "notes" / "train.jsonl").write_text(
        '{"prompt": "a", "completion": "secret"}\n' * 20
    )
    monkeypatch.chdir(tmp_path)
    settings_env(public=1)
    with pytest.raises(UserError, match="data comes from the Hub"):
        data.read(DataSource("private/notes"), Settings(public=True))
