"""The planner's arithmetic: what is added up, the largest context, the roofline, cards by name."""

from __future__ import annotations

import pytest
import tiny_models

from comparator.backends import backend_for, resolve
from comparator.capacity import cards, estimate, kv_cache, words
from comparator.core.errors import UserError
from comparator.sources import open_checkpoint

CARD = cards.Card("a card", 2 * 2**30, 100e9, "cuda", "typed")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_models.save(folder, dtype="bfloat16", max_position_embeddings=2**20, tie_word_embeddings=False)
    return open_checkpoint(str(folder))


def test_a_row_adds_up_and_the_largest_context_is_the_last_that_fits(checkpoint):
    for notation in ("bf16", "fp32", "nf4", "int8"):
        (row,) = estimate.plan(checkpoint, CARD, 4096, 4, [resolve(notation)]).rows
        variant = resolve(row.variant)
        assert row.weight_bytes + row.state_bytes == backend_for(variant).needed_bytes(
            variant, checkpoint, "cuda"
        ), "the planner's weights are not what the pool refuses by"
        parts = (
            row.weight_bytes
            + row.state_bytes
            + row.kv_bytes
            + row.activation_bytes
            + row.graph_bytes
            + row.reserve_bytes
        )
        assert row.total_bytes == parts
        assert row.kv_bytes == 4 * kv_cache.geometry(
            checkpoint, "fp32" if notation == "fp32" else "bf16"
        ).bytes(4096)

        def fits(tokens: int, variant=variant) -> bool:
            return estimate.plan(checkpoint, CARD, tokens, 4, [variant]).rows[0].fits

        assert 4096 < row.longest_context < checkpoint.context_length
        assert fits(row.longest_context) and not fits(row.longest_context + 1024)


def test_what_is_resident_says_how_good_the_estimate_is(checkpoint):
    from comparator.core.state import Resident

    variants = [resolve("bf16"), resolve("nf4")]
    plan = estimate.plan(checkpoint, cards.here(), 128, 1, variants)
    sizes = {row.variant: row.weight_bytes + row.state_bytes for row in plan.rows}
    residents = [
        Resident("a", checkpoint.source, "bf16", sizes["bf16"], "cpu"),
        Resident("b", checkpoint.source, "nf4", round(1.1 * sizes["nf4"]), "cpu"),
        Resident("c", "another model", "bf16", 1, "cpu"),
        Resident("d", checkpoint.source, "fp16", 1, "cpu"),
    ]
    said = list(words.measured(plan, residents))
    assert len(said) == 3 and "(+0.0 %)" in said[0] and "(-9.1 %)" in said[1]
    assert "Measured ÷ estimate over these 2: 1.050 ± 0.071" in said[2]
    assert not list(words.measured(plan, residents[2:]))


def test_a_quantized_cache_is_counted_in_its_bits_and_decodes_eagerly(checkpoint):
    full, eight, four = estimate.plan(
        checkpoint, CARD, 4096, 4, [resolve(n) for n in ("bf16", "bf16:kv=int8", "bf16:kv=int4")]
    ).rows
    assert [row.kv_bytes / full.kv_bytes for row in (eight, four)] == [8.5 / 16, 4.5 / 16]
    assert full.graph_bytes and not eight.graph_bytes and four.longest_context > full.longest_context


def test_llama_cpp_is_not_planned_on_a_gpu_that_it_cannot_use(checkpoint):
    (row,) = estimate.plan(checkpoint, CARD, 4096, 1, [resolve("gguf")]).rows
    assert "computed on the CPU" in row.error
    named = {v.method for v in estimate.default_variants(checkpoint, "cuda")}
    assert "gguf" not in named and "gguf" in {v.method for v in estimate.default_variants(checkpoint, "cpu")}


def test_the_roofline_reads_the_weights_once_and_each_cache(checkpoint):
    (one,) = estimate.plan(checkpoint, CARD, 100, 1, [resolve("bf16")]).rows
    (many,) = estimate.plan(checkpoint, CARD, 100, 50, [resolve("bf16")]).rows
    embedding = 320 * 32 * 2  # a row of it is read
    assert one.tok_s == pytest.approx(100e9 / (one.weight_bytes - embedding + one.kv_bytes))
    assert many.tok_s == pytest.approx(50 * 100e9 / (one.weight_bytes - embedding + 50 * one.kv_bytes))


def test_of_experts_those_that_are_taken_are_read(tmp_path):
    tiny_models.save(tmp_path, "mixtral", dtype="bfloat16", num_local_experts=8, num_experts_per_tok=2)
    checkpoint = open_checkpoint(str(tmp_path))
    sizes, dims = (
        list(backend_for(resolve("bf16")).tensor_sizes(resolve("bf16"), checkpoint)),
        estimate.dimensions(checkpoint),
    )
    one, many = (estimate.step_bytes(sizes, checkpoint, dims, users) for users in (1, 1000))
    experts = sum(s.bytes for s in sizes if ".experts." in s.name)
    assert experts and many - one == pytest.approx(experts * 6 / 8, rel=1e-6)


def test_what_does_not_fit_or_make_sense_is_said(checkpoint):
    tiny = cards.Card("tiny", 2**20, None, "cuda", "typed")
    plan = estimate.plan(checkpoint, tiny, 4096, 1, [resolve("bf16"), resolve("gptq@someone/else")])
    assert not plan.rows[0].fits and plan.rows[0].longest_context is None and plan.rows[0].tok_s is None
    assert "someone/else" in plan.rows[1].error
    assert all("stimate" in part for part in (words.intro(plan)[0], plan.to_dict()["label"]))
    with pytest.raises(UserError, match="out of range"):
        estimate.plan(checkpoint, CARD, 0, 1)


def test_every_method_that_starts_from_full_precision_has_a_row(checkpoint):
    plan = estimate.plan(checkpoint, CARD, 128)
    named = {row.variant.partition(":")[0] for row in plan.rows}
    assert {"bf16", "int8", "nf4", "gptq", "awq", "torchao"} <= named
    assert not [row for row in plan.rows if row.error and "group" not in row.error], (
        "a method without an estimate"
    )


def test_cards_are_named_as_people_type_them():
    for text in ("rtx 4090", "NVIDIA GeForce RTX 4090", "RTX4090"):
        assert cards.find(text).name == "RTX 4090"
    typed = cards.find("24GB@1.5TB/s")
    assert typed.bytes_s == 1.5e12 and 23 * 2**30 < typed.memory_bytes < 24 * 2**30
    assert cards.find("48 GB").bytes_s is None and cards.find(None) == cards.here()
    for text, words_ in (("A100", "A100 40GB or A100 80GB"), ("abacus", "RTX 4090")):
        with pytest.raises(UserError, match=words_):
            cards.find(text)
