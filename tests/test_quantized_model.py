"""A model that is quantized itself: it opens as its own column, and the page offers what it was made from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from comparator import api
from comparator.backends import own_variant
from comparator.core.state import ModelFacts
from comparator.sources import look_up
from comparator.ui.panel import model as model_panel
from comparator.ui.panel import variants

SETTINGS = {"max_new_tokens": 6, "fidelity": "none", "chat": False}


@pytest.fixture(scope="module")
def saved(two_layers: Path, tmp_path_factory) -> Path:
    """The two-layer model as nf4, saved by transformers, with a model card that names what it was made from."""
    folder = tmp_path_factory.mktemp("saved") / "model-bnb-4bit"
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model = AutoModelForCausalLM.from_pretrained(
        two_layers, dtype=torch.bfloat16, quantization_config=how, device_map="cpu"
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(two_layers).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model:\n- someone/model\n---\n# A model\n")
    return folder


def test_it_is_one_column_without_being_asked_for(saved: Path, two_layers: Path):
    whole = api.run("The sea is", model=str(saved), **SETTINGS)
    assert [c.status for c in whole.cells] == ["ok"], whole.cells[0].error
    assert whole.cells[0].variant.startswith("nf4@")
    beside = api.run("The sea is", [f"nf4@{saved}"], model=str(two_layers), **SETTINGS)
    assert whole.cells[0].token_ids == beside.cells[0].token_ids


def test_a_variant_that_needs_full_precision_fails_alone_and_says_why(saved: Path):
    whole = api.run("The sea is", ["bf16", f"nf4@{saved}"], model=str(saved), **SETTINGS)
    assert [c.status for c in whole.cells] == ["failed", "ok"]
    assert "quantized already" in whole.cells[0].error.problem and "nf4@" in whole.cells[0].error.advice


def test_the_page_selects_it_and_links_to_its_base(saved: Path):
    facts = look_up(str(saved))
    assert facts.base_model == "someone/model"
    own = own_variant(facts).notation
    value = variants.for_model(variants.picked(8), facts, 8)
    assert value["on"] == [own] and value["rows"][0]["notation"] == own
    assert all("quantized already" in row["why"] for row in value["rows"][1:])
    assert variants.for_model(value, facts, 8) is None, "another look at the same model changes nothing"
    line = model_panel.render(facts)
    assert "model=someone%2Fmodel" in line and "v=bf16" in line and "Compare it with someone/model" in line


def test_a_full_precision_model_gets_the_usual_list_again(saved: Path, two_layers: Path):
    value = variants.for_model(variants.picked(8), look_up(str(saved)), 8)
    plain = look_up(str(two_layers))
    assert variants.for_model(value, plain, 8)["on"] == list(api.DEFAULT_VARIANTS)
    assert variants.for_model(variants.picked(8), plain, 8) is None
    assert api.default_variants(str(two_layers)) == api.DEFAULT_VARIANTS


def test_a_repository_keeps_its_revision_and_an_unknown_method_has_no_column():
    nf4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    facts = ModelFacts("user/model@main", revision="abc", quantization=nf4)
    assert own_variant(facts).notation == "nf4@user/model@main"
    strange = ModelFacts("user/model", revision="abc", quantization={"quant_method": "nobody-knows"})
    assert own_variant(strange) is None and "no variant here loads" in model_panel.render(strange)


@pytest.mark.parametrize(
    "config, card, base",
    [
        ({"base_model": "a/b"}, None, "a/b"),
        ({}, '---\nbase_model: "a/b"\n---\n', "a/b"),
        ({}, "---\nlicense: mit\n---\nbase_model: a/b\n", None),
        ({"base_model": "<script>/x"}, None, None),
        ({"_name_or_path": "/home/someone/model"}, None, None),
    ],
)
def test_the_name_of_the_base_is_read_with_care(saved: Path, tmp_path: Path, config, card, base):
    from comparator.sources import folder

    (tmp_path / "config.json").write_text(json.dumps(config))
    if card:
        (tmp_path / "README.md").write_text(card)
    assert folder.base_model(tmp_path, config) == base
