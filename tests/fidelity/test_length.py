"""Divergence over the length of a text: which positions fall in which bucket, what a quantized cache loses, where it shows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import sample

from comparator.backends import resolve
from comparator.cli import tables
from comparator.core import document
from comparator.core.request import EvalSettings, GenerationSettings, Request
from comparator.core.result import Fidelity
from comparator.core.variant import Cell
from comparator.fidelity import eval_text, length
from comparator.fidelity.divergence import Positions
from comparator.reporting.plots.fidelity import kl_over_length


def test_every_position_falls_into_the_bucket_of_its_context():
    read = np.arange(1, 301)
    values = np.zeros(300)
    kl = np.where(read > 128, 2.0, 1.0)
    made = length.by_context(Positions(kl, values, values, values, (read % 2).astype(float), values), read)
    assert [(b["from"], b["to"], b["tokens"]) for b in made] == [
        (1, 64, 64),
        (65, 128, 64),
        (129, 256, 128),
        (257, 300, 44),
    ]
    assert [b["kl"] for b in made] == [1, 1, 2, 2] and made[0]["top1"] == 0.5 and made[0]["kl_se"] == 0


@pytest.mark.parametrize(
    "entries",
    [
        None,
        "x",
        [{}],
        [{"from": 1, "to": 64, "tokens": 64, "kl": "0", "top1": 1}],
        [{"from": 1, "to": 2, "tokens": 1, "kl": 1, "top1": True}],
    ],
)
def test_a_document_of_a_stranger_breaks_nothing(entries):
    cell = replace(sample.NF4, fidelity=Fidelity(text={"by_context": entries}))
    assert length.buckets(cell) == [] and not length.measured(
        sample.comparison(cells=(sample.REFERENCE, cell))
    )


@pytest.fixture(scope="module")
def compared(two_layers):
    """bf16, and the same weights with the KV cache in 4 bits, on windows of 256 tokens."""
    from comparator.comparison.runner import run
    from comparator.engines import get_engine

    request = Request(
        str(two_layers), tuple(Cell(resolve(n)) for n in ("bf16", "bf16:kv=int4")), "The sea is",
        settings=GenerationSettings(max_new_tokens=2, repeats=1), fidelity="text",
        evaluation=EvalSettings(eval_text.shipped()[:2400], "a text", 256, 256),
    )  # fmt: skip
    return run(request, engine=get_engine(), emit=lambda event: None)


def test_what_the_cache_loses_shows_after_the_first_pass(compared):
    assert all(cell.status == "ok" for cell in compared.cells), [cell.error for cell in compared.cells]
    ((cell, buckets),) = length.measured(compared)
    assert cell.variant == "bf16:kv=int4" and [b.high for b in buckets] == [64, 128, 256]
    assert sum(b.tokens for b in buckets) == cell.fidelity.text["tokens"]
    # The first pass over a window reads 64 tokens and sees its own keys and values as they are.
    assert buckets[0].kl < 1e-6 < buckets[1].kl and buckets[2].agree <= 1
    mean = sum(b.kl * b.tokens for b in buckets) / sum(b.tokens for b in buckets)
    assert mean == pytest.approx(cell.fidelity.text["kl"]["mean"])


def test_it_is_saved_drawn_and_printed(compared):
    opened = document.loads(document.dumps(compared))
    assert length.measured(opened) == length.measured(compared)
    (line,) = kl_over_length(opened).data
    assert list(line.x) == [64, 128, 256] and line.name == "bf16:kv=int4"
    printed = tables.length_table(opened)
    assert "129 to 256" in printed and "bf16:kv=int4 KL, nats" in printed
    assert tables.length_table(sample.comparison()) == ""
