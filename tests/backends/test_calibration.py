"""Calibration texts: what is taken in, what is refused, and how they become samples."""

from __future__ import annotations

import json

import pytest

from comparator import api
from comparator.backends import calibration, resolve
from comparator.core.errors import UserError


@pytest.fixture(scope="module")
def tokenizer(builtin):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(builtin.path)


def test_the_shipped_text_is_long_and_varied(tokenizer, tmp_path):
    documents = calibration.texts("", tmp_path)
    text = "\n".join(documents)
    assert sum(len(tokenizer(d)["input_ids"]) for d in documents) >= 4000
    assert len(documents) >= 12
    assert any("가" <= c <= "힣" for c in text), "Korean"
    assert any("ぁ" <= c <= "ん" for c in text), "Japanese"
    assert "def " in text and "SELECT" in text and "User:" in text, "code and dialogue"


def test_it_is_not_what_fidelity_is_measured_on(tmp_path):
    from comparator.fidelity import eval_text

    measured = eval_text.shipped()
    for document in calibration.texts("", tmp_path):
        for line in document.splitlines():
            assert len(line) < 60 or line not in measured, f"calibrated on what is measured: {line[:60]}"


def test_samples_are_equal_parts_with_an_end_between_documents(tokenizer, tmp_path):
    documents = calibration.texts("", tmp_path)
    found = calibration.samples(tokenizer, documents)
    assert len(found) >= 16 and {len(s) for s in found} == {calibration.SAMPLE_TOKENS}
    assert sum(s.count(tokenizer.eos_token_id) for s in found) >= len(documents) - 3
    assert calibration.samples(tokenizer, documents, context=64)[0] == found[0][:64]


def test_a_long_text_is_spread_over_its_length(tokenizer):
    documents = [" ".join(str(i) for i in range(k * 2000, k * 2000 + 2000)) for k in range(30)]
    found = calibration.samples(tokenizer, documents)
    assert len(found) == calibration.MOST_SAMPLES
    assert found == calibration.samples(tokenizer, documents), "the same text gives the same samples"
    last = tokenizer.decode(found[-1])
    assert any(str(n) in last for n in range(55_000, 60_000)), "the end of the text counts too"


def test_too_short_a_text_is_refused_with_both_numbers(tokenizer):
    with pytest.raises(UserError) as caught:
        calibration.samples(tokenizer, ["A few words."])
    assert "1,024" in caught.value.problem and "bundled" in caught.value.advice


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("empty.txt", b"", "empty"),
        ("blank.txt", b" \n\n ", "empty"),
        ("latin.txt", "Grüße aus Köln".encode("latin-1"), "UTF-8"),
        ("binary.txt", b"abc\0def", "UTF-8"),
        ("list.json", b'{"text": 3}', "not a list of texts"),
        ("broken.json", b'["a", ', "not a list of texts"),
        ("lines.jsonl", b'{"txt": "a"}\n', "not a list of texts"),
    ],
)
def test_a_bad_file_is_named(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        calibration.store(tmp_path / name, tmp_path)
    assert words in caught.value.problem and name in caught.value.problem and caught.value.advice
    assert not (tmp_path / "calibration").exists()


def test_a_missing_file_and_a_folder(tmp_path):
    for path, words in ((tmp_path / "none.txt", "no file"), (tmp_path, "folder")):
        with pytest.raises(UserError) as caught:
            calibration.store(path, tmp_path)
        assert words in caught.value.problem


def test_the_same_texts_have_the_same_name_however_they_come(tmp_path):
    documents = ["First text.", "Second text,\nwith two lines."]
    (tmp_path / "a.txt").write_text("First text.\n%%\nSecond text,\nwith two lines.\n")
    (tmp_path / "a.json").write_text(json.dumps(documents))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    names = {calibration.store(tmp_path / f, tmp_path) for f in ("a.txt", "a.json", "a.jsonl")}
    names.add(calibration.store(documents, tmp_path))
    assert len(names) == 1
    name = names.pop()
    assert len(name) == 8 and calibration.texts(name, tmp_path) == documents
    assert calibration.store([*documents, "more"], tmp_path) != name
    assert calibration.store(["First text.Second text,\nwith two lines."], tmp_path) != name


def test_pasted_lists():
    assert calibration.pasted("One.\nStill one.\n\n\nTwo.") == ["One.\nStill one.", "Two."]
    assert calibration.pasted('"One.\\n\\nStill one."\n"Two."') == ["One.\n\nStill one.", "Two."]
    with pytest.raises(UserError):
        calibration.pasted("  \n ")


def test_the_shipped_text_has_no_hash(tmp_path):
    assert calibration.store(calibration.SHIPPED, tmp_path) == ""
    assert calibration.applied_to(resolve("gptq"), calibration.SHIPPED, tmp_path).notation == "gptq"
    assert calibration.applied_to(resolve("gptq"), "c4", tmp_path).notation == "gptq:cal=c4"


def test_two_calibrations_at_once_are_refused(tmp_path):
    with pytest.raises(UserError) as caught:
        calibration.applied_to(resolve("gptq:cal=c4"), ["some other text"], tmp_path)
    assert "c4" in caught.value.problem


def test_the_python_api_takes_a_calibration_for_gptq_alone(own_dirs):
    asked = api.request("Hi", ["bf16", "gptq:8bit", "gptq@me/repo"], calibration=["My text. " * 9])
    notations = [c.variant.notation for c in asked.cells]
    assert notations[0] == "bf16" and notations[2] == "gptq@me/repo"
    assert notations[1].startswith("gptq:8bit,cal=")


def test_the_hub_that_cannot_be_reached_is_said_with_a_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name in calibration.FROM_HUB:
        with pytest.raises(UserError) as caught:
            calibration.texts(name, tmp_path)
        assert name in caught.value.problem and "file" in caught.value.advice
