"""What a config says of modules against what the tensors show: ranks, targets, patterns of strangers, other prefixes."""

from __future__ import annotations

import time

import pytest

from comparator.adapters.targets import Patterns, lora_ranks, placed
from comparator.core.errors import UserError

Q = "model.layers.{}.self_attn.q_proj"
ROWS = {Q.format(n): [4] for n in range(2)}


def ranks(rows, **config):
    return set(lora_ranks(Patterns(config, "someone/lora"), rows).values())


@pytest.mark.parametrize(
    "pattern",
    [
        "(([a-z_.0-9])*)*!",
        r"(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6\7\8\9[^\w.]",
        "(a{1000}){1000}",
        "(((a{99}){99}){99}){99}",
        "(" * 500 + ")" * 500,
        "a{99999999999}",
        "q_proj[",
    ],
)
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"])
def test_no_pattern_of_a_stranger_takes_long(key, pattern):
    config = {key: {pattern: 3} if key.endswith("pattern") else pattern}
    start = time.monotonic()
    patterns = Patterns({"r": 4, **config}, "someone/lora")
    try:
        matched = patterns.targets(Q.format(0)), patterns.value(key, Q.format(0), None)
        assert matched in ((False, None), (True, None)), "it matches no module"
    except UserError as refused:
        assert key in str(refused) and "someone/lora" in str(refused)
    assert time.monotonic() - start < 10, "matched by `re`, or without a time limit"


@pytest.mark.parametrize("key", ["modules_to_save", "layers_pattern"])
def test_names_that_peft_makes_patterns_of_are_plain(key):
    Patterns({key: ["lm_head", "model.embed_tokens"]}, "a")
    with pytest.raises(UserError, match=key):
        Patterns({key: ["(([a-z])*)*!"]}, "a")


@pytest.mark.parametrize(
    ("config", "rows", "expected"),
    [
        ({"r": 4}, ROWS, {4}),
        ({"r": 64, "rank_pattern": {"q_proj": 4}}, ROWS, {4}),
        ({"r": 64, "rank_pattern": {r"layers\.\d+\.self_attn\.q_proj": 4}}, ROWS, {4}),
        ({"r": 2, "target_parameters": ["mlp.experts.down_proj"]}, {"model.layers.0.mlp.experts": [16]}, {2}),
        (
            {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
            {"model.layers.0.mlp.experts": [16], Q.format(0): [2]},
            {2},
        ),
    ],
)
def test_ranks(config, rows, expected):
    assert ranks(rows, **config) == expected, "eight experts of rank 2 are rank 2, not 16"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 8000}, "rank 8,000.*q_proj have rank 4"),
        ({"r": 4, "rank_pattern": {"q_proj": 8}}, "rank 8.*rank 4"),
        ({"r": "4"}, "no rank"),
        ({"r": 4, "target_modules": ["v_proj"]}, "target_modules.*none of the modules"),
        ({"r": 4, "target_modules": ".*k_proj"}, "target_modules.*none of the modules"),
    ],
)
def test_a_config_that_contradicts_the_tensors_is_refused(config, words):
    with pytest.raises(UserError, match=words):
        ranks(ROWS, **config)


def test_a_config_without_a_pattern_targets_as_peft_does():
    def targets(name, **config):
        return Patterns(config, "a").targets(name)

    assert targets(Q.format(3), target_modules=["q_proj"]) and targets("q_proj", target_modules=["q_proj"])
    assert not targets(Q.format(3), target_modules=["proj"]), "the end of a name is not the name"
    assert targets(Q.format(3), target_modules=r".*\.self_attn\.(q|v)_proj")
    assert not targets(Q.format(3), target_modules=["q_proj"], exclude_modules=r".*layers\.3\..*")
    assert not targets("lm_head", target_modules="all-linear", modules_to_save=["lm_head"])


def test_modules_are_found_below_another_prefix():
    text = [Q.format(0), "lm_head", "model.norm"]
    vision = [
        "model.language_model.layers.0.self_attn.q_proj",
        "model.visual.layers.0.self_attn.q_proj",
        "lm_head",
    ]
    assert placed(text, text) == {name: name for name in text}
    assert placed([Q.format(0)], vision) == {Q.format(0): vision[0]}, "text goes to the text part"
    assert placed(vision[:1], text) == {vision[0]: Q.format(0)}
    assert placed(vision[1:2], text) == {}, "a vision tower's layer is not the text's"
    assert placed(["transformer.h.0.attn.c_attn"], ["h.0.attn.c_attn"]) == {
        "transformer.h.0.attn.c_attn": "h.0.attn.c_attn"
    }
    both = ["model.encoder.layers.0.q_proj", "model.decoder.layers.0.q_proj"]
    assert placed(["layers.0.q_proj"], both) == {}, "two places are none"
    assert placed(["decoder.layers.0.q_proj"], both) == {"decoder.layers.0.q_proj": both[1]}
