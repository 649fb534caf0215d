"""“Add a method” in CONTRIBUTING.md: its example is taken from the page and works as a module of comparator/backends."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import pytest

from comparator import api, backends
from comparator.backends.base import Placement
from comparator.comparison import runner
from comparator.core.errors import UserError
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint
from comparator.ui import layer_summary

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None,
    reason="torchao is installed with gptqmodel, which is not here",
)
GUIDE = Path(__file__).resolve().parents[2] / "CONTRIBUTING.md"


@pytest.fixture(scope="module")
def example(register):
    section = GUIDE.read_text(encoding="utf-8").partition("## Add a method")[2].partition("\n## ")[0]
    (source,) = re.findall(r"```python\n(.*?)```", section, re.S)
    return register("torchao", source)


def test_its_options_are_those_of_the_page(example):
    assert backends.resolve("ao8:scales=row").notation == "ao8"
    with pytest.raises(UserError, match="scales=column"):
        backends.resolve("ao8:scales=column")
    for notation in ("ao8", "ao8:scales=tensor"):
        imports, setup, arguments = example.code(backends.resolve(notation), Placement())
        ast.parse("\n".join([*imports, *setup, f"load({', '.join(arguments)})"]))


def test_a_model_answers_with_it(example, two_layers, own_engine):
    request = api.request("The capital of France is", ["bf16", "ao8"], str(two_layers), max_new_tokens=4)
    comparison = runner.run(request, engine=own_engine, emit=lambda event: None)
    column = comparison.cell("ao8")
    assert column.status == "ok", column.error
    assert len(column.token_ids) == 4 and 0 < max(column.fidelity.prompt.kl) < 1

    rows = {row.name: row for row in column.layers}
    row = rows["model.layers.1.mlp.down_proj.weight"]
    assert (row.storage_dtype, row.logical_dtype, row.shape) == ("int8", "ao int8", (576, 1536))
    assert row.bytes == 576 * 1536 and row.quant_state_bytes == 576 * (4 + 1), (
        "a scale and a zero point per row"
    )
    assert 0.001 < row.error["relative"] < 0.02
    assert layer_summary.in_words(row) == "8-bit integers with scales, in a torchao tensor"
    assert rows["model.embed_tokens.weight"].storage_dtype == "bf16"
    assert column.memory.weight_bytes == sum(r.bytes for r in column.layers)
    assert example.needed_bytes(backends.resolve("ao8"), open_checkpoint(str(two_layers))) == pytest.approx(
        column.memory.weight_bytes, rel=0.01
    )
    assert comparison.environment.packages["torchao"] in snippet(column, comparison)
