"""One storage for what several variants have in common, and no second reading of the checkpoint: on real weights."""

from __future__ import annotations

import threading

import pytest
import tiny_models

from comparator.backends import resolve
from comparator.core.settings import Settings
from comparator.engine.pool import Pool
from comparator.runtimes.transformers import weight_sharing
from comparator.sources import open_checkpoint

NEVER = threading.Event()


@pytest.fixture(scope="module")
def checkpoint(two_layers):
    return open_checkpoint(str(two_layers), settings=Settings())


@pytest.fixture
def pool(checkpoint):
    pool = Pool(Settings())
    yield pool
    pool.unload()


def load(pool, checkpoint, notation, **options):
    return pool.load(
        checkpoint, resolve(notation), options.get("max_memory"), True, set(), lambda *_: None, NEVER
    )[0]


def tensors(model) -> dict[str, object]:
    """Everything it holds, quant states included, by place and value."""
    from comparator.metrics.memory import held_tensors

    return sorted((str(t.dtype), tuple(t.shape), t.float().sum().item()) for t in held_tensors(model))


def answer(slot, ids=(1, 4093, 314, 260, 3575, 282, 4649, 47), count=8):
    from comparator.benchmark.runs import our_run

    return our_run(slot, list(ids), count, None).token_ids


def read_files(monkeypatch) -> list[str]:
    """The safetensors files that transformers opens from now on."""
    import transformers.modeling_utils as where

    opened, before = [], where.safe_open

    def opening(path, *args, **kwargs):
        opened.append(str(path))
        return before(path, *args, **kwargs)

    monkeypatch.setattr(where, "safe_open", opening)
    return opened


@pytest.mark.parametrize("notation", ["int8", "nf4", "nf4:dq", "fp4", "fp16", "fp32"])
def test_what_is_made_from_a_resident_variant_is_what_the_file_gives(pool, checkpoint, notation, monkeypatch):
    alone = load(pool, checkpoint, notation)
    expected, tokens = tensors(alone.model), answer(alone)
    assert not any("was in memory" in note for note in alone.notes)
    pool.unload()
    alone = None

    opened = read_files(monkeypatch)
    load(pool, checkpoint, "bf16")
    assert opened, "this test no longer sees the reading: transformers opens its files another way"
    opened.clear()
    beside = load(pool, checkpoint, notation)
    assert not opened, f"{notation} read the checkpoint again although bf16 held it"
    assert any("Made from the resident weights of bf16" in note for note in beside.notes), (
        "the column has to say so"
    )
    assert tensors(beside.model) == expected, "not the tensors that loading from the file gives"
    assert answer(beside) == tokens
    assert beside.model.generation_config.eos_token_id is not None


def test_bytes_are_held_once_and_unloading_one_hurts_no_other(pool, checkpoint):
    slots = [load(pool, checkpoint, n) for n in ("nf4", "bf16", "int8", "fp16")]
    nf4, bf16, int8, fp16 = slots
    embedding = bf16.model.get_input_embeddings().weight
    size = embedding.numel() * 2
    for other in (nf4, int8):
        assert other.model.get_input_embeddings().weight.data_ptr() == embedding.data_ptr()
        assert other.model.get_output_embeddings().weight.data_ptr() == embedding.data_ptr(), "the tied head"
    assert fp16.model.get_input_embeddings().weight.data_ptr() != embedding.data_ptr(), "another dtype"

    assert (nf4.memory.shared_bytes, fp16.memory.shared_bytes) == (0, 0)
    for slot in (bf16, int8):  # loaded after nf4, which held the embedding and the norms
        assert size < slot.memory.shared_bytes < size + 200_000
        assert slot.memory.resident_bytes > slot.memory.shared_bytes
    together = weight_sharing.storages(bf16.model) | weight_sharing.storages(nf4.model)
    together |= weight_sharing.storages(int8.model) | weight_sharing.storages(fp16.model)
    assert pool.held_bytes == sum(together.values()), "the sum of what is held less what is shared"
    assert [r.shared_bytes for r, _ in pool.residents()] == [
        s.memory.shared_bytes for s in pool.slots.values()
    ]

    said = {s.variant.notation: answer(s) for s in slots}
    pool.unload(nf4.handle)
    pool.unload(bf16.handle)
    assert pool.shared_bytes(int8) == 0, "who else held it is gone"
    for slot in (int8, fp16):
        assert answer(slot) == said[slot.variant.notation], "unloading another variant hurt this one"
    again = load(pool, checkpoint, "nf4")
    assert answer(again) == said["nf4"]
    assert again.memory.shared_bytes > size


def test_only_the_checkpoint_itself_is_lent(pool, checkpoint, tmp_path):
    load(
        pool, checkpoint, "fp32"
    )  # not the dtype of the file: bf16 from fp32 would be the same, fp16 not always
    slots = pool.slots.values()
    assert weight_sharing.lent(checkpoint, slots, "cpu") is None
    load(pool, checkpoint, "bf16")
    found = weight_sharing.lent(checkpoint, slots, "cpu")
    assert found is not None and found.lender == "bf16"
    assert weight_sharing.lent(checkpoint, slots, "cuda:0") is None, (
        "on another device there is nothing to lend"
    )
    tiny_models.save(tmp_path / "other", "llama")
    other = open_checkpoint(str(tmp_path / "other"), settings=Settings())
    assert weight_sharing.lent(other, slots, "cpu") is None


def test_a_folder_that_was_written_anew_lends_nothing(tmp_path):
    import torch

    model = tiny_models.save(tmp_path / "m", "llama")
    pool, settings = Pool(Settings()), Settings()
    first = open_checkpoint(str(tmp_path / "m"), settings=settings)
    dtype = first.dtype
    load(pool, first, dtype)
    assert weight_sharing.lent(first, pool.slots.values(), "cpu") is not None
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    model.save_pretrained(tmp_path / "m")
    second = open_checkpoint(str(tmp_path / "m"), settings=settings)
    assert weight_sharing.lent(second, pool.slots.values(), "cpu") is None
    slot = load(pool, second, dtype)
    embeddings = {s.model.get_input_embeddings().weight.data_ptr() for s in pool.slots.values()}
    assert len(embeddings) == 2, "other values may not become the same storage"
    assert slot.memory.shared_bytes > 0, "the rest is the same bit for bit, and may"
    pool.unload()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma", "opt", "bloom", "gpt2", "gpt_neox"])
def test_every_architecture_loads_beside_its_own_full_precision(kind, tmp_path):
    """Some change names or merge tensors while they load: these read the file, and give the same either way."""
    tiny_models.save(tmp_path / kind, kind)
    checkpoint = open_checkpoint(str(tmp_path / kind), settings=Settings())
    pool = Pool(Settings())
    alone = load(pool, checkpoint, "nf4")
    expected, tokens = tensors(alone.model), answer(alone, (5, 6, 7, 8))
    pool.unload()
    load(pool, checkpoint, checkpoint.dtype)
    beside = load(pool, checkpoint, "nf4")
    assert tensors(beside.model) == expected
    assert answer(beside, (5, 6, 7, 8)) == tokens
    pool.unload()


def test_a_base_that_was_written_into_takes_all_that_share_it_along(pool, checkpoint):
    nf4, bf16, fp16 = (load(pool, checkpoint, n) for n in ("nf4", "bf16", "fp16"))
    assert pool.unload_altered(nf4) == "nf4 and bf16 were"
    assert list(pool.slots.values()) == [fp16], "another dtype shares nothing and stays"


def test_the_page_says_what_is_held_together(pool, checkpoint):
    from dataclasses import replace

    import sample

    from comparator.ui.tabs import memory

    slots = [load(pool, checkpoint, n) for n in ("bf16", "nf4")]
    comparison = sample.comparison()
    assert memory.together(replace(comparison, cells=comparison.cells[:1])) == "", "nothing is shared there"
    cells = tuple(replace(comparison.cells[0], variant=s.variant.notation, memory=s.memory) for s in slots)
    said = memory.together(replace(comparison, cells=cells))
    assert "Together the 2 variants take" in said and "56.6 MB less" in said, said
    one_with_adapter = replace(
        cells[1], adapter="pirate", memory=replace(slots[1].memory, adapter_bytes=10**6,
                                                   resident_bytes=slots[1].memory.resident_bytes + 10**6)
    )  # fmt: skip
    again = memory.together(replace(comparison, cells=(*cells, one_with_adapter)))
    assert again == said, "a base counts once, whatever it wears"
