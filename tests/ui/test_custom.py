"""The form for a variant of one's own, made from what the backends say; and the list it adds to."""

from __future__ import annotations

import pytest

from comparator.backends import methods, resolve
from comparator.core.errors import UserError
from comparator.ui.panel import custom_variant, variants
from comparator.ui.panel.custom_variant import _field, compose, described

ALL = methods()
OPTIONS = [(name, option) for name, (_, method) in ALL.items() for option in method.options]


def defaults(name: str) -> dict:
    """The values that the fields of a method hold at first."""
    _, method = ALL[name]
    return {option: _field(option).value for option in method.options}


@pytest.mark.parametrize("name", ALL)
def test_an_untouched_form_makes_the_plain_method(name):
    assert compose(*ALL[name], defaults(name)) == resolve(name).notation


@pytest.mark.parametrize(("name", "option"), OPTIONS, ids=[f"{n}-{o.name}" for n, o in OPTIONS])
def test_every_choice_of_every_option_makes_its_notation(name, option):
    values = {"flag": [True, False], "number": [o for o in (option.minimum, option.maximum) if o is not None]}
    for value in values.get(option.kind, list(option.choices)):
        given = defaults(name) | {option: value}
        if option.kind == "number":
            given[option] = float(value)
        text = compose(*ALL[name], given)
        try:
            assert resolve(text).notation == text, "what the form writes is canonical"
        except UserError as refused:
            assert refused.advice, f"{text} is refused without a way out"


@pytest.mark.parametrize("name", ALL)
def test_every_option_has_a_field_of_its_kind(name):
    backend, method = ALL[name]
    slots = custom_variant._slots([m for _, m in ALL.values()])
    placed = custom_variant._placed(slots, method)
    filled = [o for o in placed if o is not custom_variant.EMPTY]
    assert len(placed) == sum(slots.values()) and len(filled) == len(set(filled))
    assert set(filled) == {*method.options, *([None] if method.takes_source else [])}
    for option, field in zip(placed, custom_variant._inputs(slots, backend, method), strict=True):
        assert field.visible is (option is not custom_variant.EMPTY)


def test_a_source_goes_behind_the_at():
    takers = [name for name, (_, method) in ALL.items() if method.takes_source]
    for name in takers:
        assert compose(*ALL[name], {None: "someone/model@main"}) == f"{name}@someone/model@main"


def test_an_address_of_a_server_may_be_typed():
    assert compose(*ALL["endpoint"], {None: "http://host:8000/v1"}) == "endpoint@http://host:8000/v1"
    assert "bad" not in described("endpoint@http://host:8000/v1")


def test_listed_servers_are_offered_for_every_model(settings_env):
    settings_env(endpoints="vllm=http://10.0.0.5:8000/v1")
    rows = variants.picked(8, "smollm2-135m")["rows"]
    (row,) = (r for r in rows if r["notation"] == "endpoint@vllm")
    assert row["group"] == "servers" and row is rows[-1] and "10.0.0.5" not in str(rows), (
        "an address is shown"
    )


def test_names_may_be_typed_with_commas():
    skip = next(o for o in ALL["nf4"][1].options if o.name == "skip")
    assert compose(*ALL["nf4"], {skip: "q_proj, lm_head"}) == "nf4:skip=lm_head+q_proj"


@pytest.mark.parametrize(
    "text", ["", "nf5", "nf4:dqq", "nf4:compute=fp12", "int8:dq", "nf4:", "bf16@x", "<b>"]
)
def test_what_is_wrong_is_said_as_it_is_typed(text):
    html = described(text)
    assert "bad" in html and "<b>" in html
    assert "<b><b>" not in html, "what was typed must not become markup"


def test_what_is_right_is_said_in_words():
    assert "double quantized" in described("nf4:dq")


def test_adding_ticks_and_keeps_the_order():
    first = variants.picked(8)
    more = variants.with_added(first, "nf4:dq,compute=fp16", 8)
    assert more["on"] == [*first["on"], "nf4:dq,compute=fp16"]
    assert more["rows"][-1]["custom"] and not first["rows"][-1]["custom"]
    again = variants.with_added(more | {"on": ["bf16"]}, "nf4:compute=fp16,dq", 8)
    assert len(again["rows"]) == len(more["rows"]), "the same variant in another spelling is no new row"
    with pytest.raises(UserError, match="already"):
        variants.with_added(again, "nf4:dq,compute=fp16", 8)


@pytest.mark.parametrize("value", [None, "x", {}, {"rows": "x", "on": 3}, {"rows": [1], "on": [None]}])
def test_a_forged_list_does_no_harm(value):
    assert variants.with_added(value, "fp4:dq", 8)["on"][-1] == "fp4:dq"


def test_only_what_fits_is_ticked_at_first():
    assert variants.picked(2)["on"] == ["bf16", "int8"]


def test_what_a_model_has_beside_the_presets_is_listed_for_it_alone():
    """The built-in model's own GGUF file, which another model does not have."""
    from comparator.core.state import ModelFacts

    def names(value):
        return [row["notation"] for row in value["rows"]]

    first = variants.picked(8, "smollm2-135m")
    assert "gguf@smollm2-135m" in names(first) and "gguf@smollm2-135m" not in names(variants.picked(8))
    assert variants.for_model(first, ModelFacts("smollm2-135m"), 8) is None
    assert variants.for_model(first, None, 8) is None, "nothing is known of the model that is being typed"
    chosen = variants.with_added(first | {"on": ["bf16", "gguf@smollm2-135m"]}, "fp4:dq", 8)
    other = variants.for_model(chosen, ModelFacts("user/model"), 8)
    assert "gguf@smollm2-135m" not in names(other) and other["on"] == ["bf16", "fp4:dq"]
    assert names(other)[-1] == "fp4:dq", "what was added by hand stays"
    assert "gguf@smollm2-135m" in names(variants.for_model(other, ModelFacts("smollm2-135m"), 8))


@pytest.mark.parametrize(("gpus", "zero_gpu", "why"), [(0, "", "NVIDIA"), (1, "", ""), (0, "1", "")])
def test_what_runs_on_a_gpu_only_is_unavailable_without_one(monkeypatch, gpus, zero_gpu, why):
    """ZeroGPU lends its GPU later."""
    monkeypatch.setattr(variants.nvml, "gpus", lambda: gpus)
    monkeypatch.setenv("SPACES_ZERO_GPU", zero_gpu)
    rows = {row["notation"]: row["why"] for row in variants.picked(8)["rows"]}
    assert why in rows["torchao:scheme=int4"] and bool(why) == bool(rows["torchao:scheme=fp8dyn"])
    assert not rows["torchao"] and not rows["nf4"]
