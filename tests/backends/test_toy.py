"""The contract of a backend holds everything: a method that only this file knows appears wherever methods do.

It stores two 4-bit values in each byte, with one scale per row, in a buffer called `packed`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace

import gradio as gr
import pytest

from comparator import adapters, api, backends
from comparator.backends import transformers_loader
from comparator.backends.base import (
    Backend,
    LoadedModel,
    Logical,
    Method,
    Option,
    QuantizedType,
    TensorSize,
    Training,
)
from comparator.cli import inspect, tables
from comparator.comparison import runner
from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.result import CellResult, Comparison
from comparator.core.settings import get_settings
from comparator.core.variant import Cell, parse_adapter
from comparator.metrics import environment
from comparator.reporting.snippet import snippet
from comparator.sources import open_checkpoint
from comparator.training import memory_estimate
from comparator.training.settings import TrainSettings
from comparator.ui import layer_summary
from comparator.ui.panel import custom_variant

NAME = "model.layers.0.mlp.up_proj.packed"


@cache
def rows_linear() -> type:
    """The class of the quantized layer, made when torch is there."""
    import torch

    class RowsLinear(torch.nn.Module):
        def __init__(self, linear: torch.nn.Linear, clip: float):
            super().__init__()
            self.out_features, self.in_features = linear.weight.shape
            weight = linear.weight.float()
            scale = clip * weight.abs().amax(dim=1, keepdim=True) / 7
            levels = ((weight / scale).round().clamp(-8, 7) + 8).to(torch.uint8)
            self.register_buffer("packed", levels[:, ::2] | levels[:, 1::2] << 4)
            self.register_buffer("scale", scale)

        def unpacked(self) -> torch.Tensor:
            levels = torch.stack([self.packed & 15, self.packed >> 4], dim=2).flatten(1)
            return (levels.float() - 8) * self.scale

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(x, self.unpacked().to(x.dtype))

    return RowsLinear


class Rows(Backend):
    name = "rows"
    requires = ("torch", "transformers", "numpy")
    libraries = (__name__,)
    weight_name = "packed"
    types = (QuantizedType("rows4", 4),)
    methods = (
        Method(
            "rows4",
            "a toy",
            "Four bits per weight, one scale per row.",
            (Option("clip", "share of the range that is kept", "1", kind="number", minimum=0.1, maximum=1),),
            precision=25,
            bits=4,
        ),
    )

    def tensor_sizes(self, variant, checkpoint, device=""):
        return [TensorSize(t.name, t.parameters * 2) for t in checkpoint.tensors]

    def load(self, checkpoint, variant, placement, progress):
        model = transformers_loader.from_pretrained(checkpoint, placement, progress, dtype="bf16")
        clip = float(self.values(variant)["clip"])
        for parent in list(model.model.layers.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__name__ == "Linear":
                    setattr(parent, name, rows_linear()(child, clip))
        return LoadedModel(model, "toy RowsLinear", ["Quantized by a toy."])

    def quant_state(self, module):
        return {"scale": module.scale} if self.owns(module) else {}

    def logical(self, module, parameter):
        if not self.owns(module):
            return None
        return Logical("rows4", (module.out_features, module.in_features), "bf16")

    def dequantize(self, module):
        return module.unpacked() if self.owns(module) else None

    def check_adapter(self, variant, adapter):
        if adapter.merged:
            raise UserError("rows4 takes no merge.", "Leave :merged out.")

    def code(self, variant, placement, *, layers=(), kernel=None):
        return ["import toyrows"], [f"quantization = toyrows.Config({self.values(variant)['clip']})"], [
            "quantization_config=quantization"
        ]  # fmt: skip


@pytest.fixture(scope="module")
def rows(register) -> Rows:
    return register("rows", f"from {__name__} import Rows\n")


@pytest.fixture(scope="module")
def comparison(rows, two_layers, own_engine) -> Iterator[Comparison]:
    """bf16 and the toy on the two-layer model, as it comes back from its document."""
    request = api.request("The capital of France is", ["bf16", "rows4"], str(two_layers), max_new_tokens=3)
    done = runner.run(request, engine=own_engine, emit=lambda event: None)
    return document.loads(document.dumps(done))


@pytest.fixture
def column(comparison) -> CellResult:
    column = comparison.cell("rows4")
    assert column.status == "ok", column.error
    return column


def test_the_command_line_lists_it(rows, capsys):
    listed = {m["method"]: m for m in inspect.described()}
    assert listed["rows4"]["options"][0]["maximum"] == 1 and not listed["rows4"]["unavailable"]
    inspect.variants()
    printed = capsys.readouterr().out
    assert "Four bits per weight" in printed and "clip=1" in printed


def test_the_form_of_the_page_offers_it(rows):
    with gr.Blocks() as page:
        fields = {"picked": gr.Dropdown([], multiselect=True)}
        custom_variant.build(SimpleNamespace(settings=get_settings(), fields=fields))
    blocks = list(page.blocks.values())
    method = next(b for b in blocks if getattr(b, "elem_id", None) == "custom-method")
    assert ("rows4: a toy", "rows4") in method.choices
    known = backends.methods()
    inputs = custom_variant._inputs(custom_variant._slots([m for _, m in known.values()]), *known["rows4"])
    clip = next(field for field in inputs if field.label == "clip")
    assert clip.value == 1 and clip.info == "share of the range that is kept"
    option = rows.methods[0].options[0]
    assert custom_variant.compose(*backends.methods()["rows4"], {option: 0.9}) == "rows4:clip=0.9"
    assert "bad" not in custom_variant.described("rows4:clip=0.9")
    assert "out of range" in custom_variant.described("rows4:clip=2")


def test_layer_rows_show_what_is_stored_and_what_it_means(column):
    row = next(r for r in column.layers if r.name == NAME)
    assert (row.storage_dtype, row.storage_shape) == ("uint8", (1536, 288))
    assert (row.logical_dtype, row.shape, row.compute_dtype) == ("rows4", (1536, 576), "bf16")
    assert row.module_class == "test_toy RowsLinear", "the library is named before the class"
    assert [(p.name, p.shape) for p in row.state] == [("scale", (1536, 1))]
    assert row.bits_per_weight == pytest.approx(4 + 32 / 576)
    assert not [r for r in column.layers if r.name.endswith(".scale")], "quant state has no row of its own"
    assert layer_summary.in_words(row) == "4-bit values (rows4), two in each uint8 byte"
    assert "are rows4 at 4." in layer_summary.headline(column)
    assert "rows4" in tables.layers_table(column.layers)


def test_bytes_are_counted_once_and_quant_state_apart(column, comparison):
    sizes = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576),
             "gate": (1536, 576), "up": (1536, 576), "down": (576, 1536)}  # fmt: skip
    packed = 2 * sum(a * b // 2 for a, b in sizes.values())
    state = 2 * sum(4 * a for a, _ in sizes.values())
    plain = comparison.cell("bf16").memory.weight_bytes - 4 * packed
    assert column.memory.weight_bytes == packed + plain
    assert column.memory.quant_state_bytes == state
    assert column.memory.resident_bytes >= packed + plain + state


def test_its_error_and_its_distance_from_the_reference_are_measured(column):
    row = next(r for r in column.layers if r.name == NAME)
    assert 0.01 < row.error["relative"] < 0.5, "dequantize is not asked, or gives another weight"
    kl = column.fidelity.prompt.kl
    assert any(value > 0 for value in kl) and all(map(math.isfinite, kl))


def test_the_copied_code_is_its_own(column, comparison):
    text = snippet(column, comparison)
    assert "import toyrows" in text and "quantization = toyrows.Config(1)" in text
    assert f'"numpy=={comparison.environment.packages["numpy"]}"' in text


def test_the_environment_names_its_library(column, comparison, rows):
    import numpy

    assert comparison.environment.packages["numpy"] == numpy.__version__
    assert "numpy" in environment.package_versions() and "Quantized by a toy." in column.notes


def test_training_is_refused_until_it_is_declared(rows, two_layers, monkeypatch):
    checkpoint, variant = open_checkpoint(str(two_layers)), backends.resolve("rows4")

    def estimate():
        return memory_estimate.estimate(
            checkpoint, variant, TrainSettings(), rows=8, longest=32, device="cpu", free_bytes=2**40
        )

    with pytest.raises(UserError, match="rows4"):
        estimate()
    monkeypatch.setattr(Rows, "training", lambda self, variant, device: Training("bf16"))
    assert estimate().weight_bytes == rows.needed_bytes(variant, checkpoint)


def test_its_rule_for_adapters_is_asked(rows, builtin):
    cell = Cell(backends.resolve("rows4"), parse_adapter("pirate:merged"))
    with pytest.raises(UserError, match="rows4 takes no merge"):
        adapters.plan(cell.adapter, builtin, cell.variant)
