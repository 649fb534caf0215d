"""The Layers tab: how weights are stored, the answer to "why uint8?", and every tensor, beside another column's.

The tensors are a tree by block (layer_tree.py), filtered here, opened and closed in the browser (page.js)."""

from __future__ import annotations

from collections import Counter

import gradio as gr

from comparator.core.result import CellResult
from comparator.ui import layer_summary, layer_tree
from comparator.ui.form import Shown
from comparator.ui.layer_table import FACETS, Filter, bits, small, tensor_table
from comparator.ui.markup import bar, esc, note, sized, table
from comparator.ui.page import PRIVATE, Choice, Page, Ticks, html
from comparator.util import formatting

KIND_HEADS = (
    ("Stored as", "how the values are stored in memory"),
    ("Tensors", ""),
    ("Weights", "number of parameters (logical)"),
    ("Share", "of all weights"),
    ("MB", "10^6 bytes"),
    ("Quant state, MB", "scales and codebooks"),
    ("Bits per weight", "8 × (bytes + quant state) / parameters"),
)
PART_HEADS = (
    ("Part", "by the tensors' names, over all blocks"),
    ("MB", "10^6 bytes, quant state included"),
    ("Share", "of all bytes"),
    ("Weights", "number of parameters (logical)"),
    ("Bits per weight", "8 × (bytes + quant state) / parameters"),
)
NOTHING = "none"
EMPTY = "Press Run. Once a variant has answered, this tab shows how every tensor of it is stored."


def build(page: Page) -> None:
    with gr.Tab("Layers", id="layers"):
        with gr.Row(elem_classes="controls", visible=False) as controls:
            column = Choice([], label="Variant", filterable=False, elem_id="layers-column")
            other = Choice([], label="Compare with", filterable=False, elem_id="layers-other")
        summary = html(note(EMPTY))
        with gr.Row(elem_classes="controls search", visible=False) as finder:
            search = gr.Textbox(
                "", label="Search tensors", placeholder="layers.0 q_proj, uint8, norm …", elem_id="layers-search",
                max_lines=1, lines=1,
            )  # fmt: skip
            changed = gr.Checkbox(
                False, label="Only differences", visible=False, elem_id="layers-changed", container=False
            )
        with gr.Row(elem_classes="facets", visible=False) as facets:
            chips = [Ticks([], label=facet.title, elem_classes="chips") for facet in FACETS]
        rows = html(elem_id="layers-table", js_on_load="qc.tree(element)")

        inputs = [page.shown, column, other, search, changed, *chips]
        page.on_comparison(offer, [controls, finder, facets, column, other], running=True)
        # The choices depend on the comparison, and the table on the choices.
        gr.on(
            [page.shown.change, column.change, other.change],
            view, inputs=inputs, outputs=[summary, rows, changed, *chips], trigger_mode="always_last", **PRIVATE,
        )  # fmt: skip
        gr.on(
            [search.change, changed.change, *(chip.input for chip in chips)],
            lambda *values: view(*values)[1],
            inputs=inputs, outputs=[rows], trigger_mode="always_last", **PRIVATE,
        )  # fmt: skip


def offer(shown: Shown):
    """The columns to select from. A packed one comes first, since it raises the most questions, beside the reference."""
    names = _names(shown)
    if not names:
        return *(gr.Row(visible=False) for _ in range(3)), gr.skip(), gr.skip()
    packed = (n for n in names if layer_summary.why_the_dtype(_cell(shown, n)))
    quantized = (n for n in names if _quantized(_cell(shown, n)))
    first = next(packed, next(quantized, names[0]))
    name = shown.comparison.reference
    cell = shown.comparison.cell(name.variant, name.adapter) if name else None
    beside = cell.label if cell and cell.label in names and cell.label != first else NOTHING
    return (
        *(gr.Row(visible=True) for _ in range(3)),
        gr.Dropdown(choices=names, value=first),
        gr.Dropdown(choices=[NOTHING, *names], value=beside),
    )


def _names(shown: Shown) -> list[str]:
    return [c.label for c in shown.comparison.cells if c.layers] if shown.comparison else []


def _cell(shown: Shown, label: str | None) -> CellResult | None:
    return next((c for c in shown.comparison.cells if c.label == label), None) if shown.comparison else None


def _quantized(cell: CellResult | None) -> bool:
    return cell is not None and any(layer_summary.bits_of(row.logical_dtype) for row in cell.layers)


def view(shown: Shown, name: str, against: str, query: str, only_changed: bool, *ticked: list[str]):
    """(summary, table, visibility of "Only differences", chips …) for the selected column or pair.

    ticked: of each of FACETS the chosen values; none chosen is all.
    """
    cell, other = _cell(shown, name), _cell(shown, against)
    if not _names(shown):
        return note(EMPTY), "", gr.Checkbox(visible=False), *(gr.skip() for _ in FACETS)
    if cell is None:  # the choices follow
        return tuple(gr.skip() for _ in range(3 + len(FACETS)))
    other = None if other is cell else other
    wanted = Filter(query or "", bool(only_changed), tuple(tuple(values or ()) for values in ticked))
    chips = []
    for facet, values in zip(FACETS, ticked, strict=True):
        counts = Counter(facet.of(row) for row in cell.layers)
        choices = [(f"{value} · {count:,}", value) for value, count in counts.most_common()]
        chosen = [value for value in values or () if value in counts]
        chips.append(Ticks(choices, value=chosen, visible=len(counts) > 1))
    return summary(cell), tensor_table(cell, other, wanted), gr.Checkbox(visible=other is not None), *chips


def summary(cell: CellResult) -> str:
    """How the weights are stored, as a sentence and a small table; for packed weights, why the dtype is uint8."""
    groups = layer_summary.kinds(cell.layers)
    total = sum(k.parameters for k in groups)
    rows = [
        [
            f'<span title="{esc(", ".join(k.module_classes))}">{esc(k.words)}</span>',
            sized(formatting.count(k.tensors), k.tensors),
            sized(formatting.parameters(k.parameters), k.parameters),
            sized(formatting.percent(k.parameters / total if total else None), k.parameters),
            sized(formatting.megabytes(k.bytes, unit=False), k.bytes),
            sized(formatting.megabytes(k.quant_state_bytes, unit=False), k.quant_state_bytes),
            sized(formatting.figure(k.bits_per_weight), k.bits_per_weight),
        ]
        for k in groups
    ]
    why = layer_summary.why_the_dtype(cell)
    return (
        f"<h3>{esc(cell.label)}: how weights are stored</h3>"
        + note(esc(layer_summary.headline(cell)))
        + table(
            KIND_HEADS, rows, caption=f"Storage formats in {cell.label}", numeric=range(1, 7), name="kinds"
        )
        + parts_table(cell)
        + (note(esc(why), "why-uint8") if why else "")
    )


def parts_table(cell: CellResult) -> str:
    """Bytes of embedding, attention, MLP, norms and head over all blocks, as bars."""
    groups = layer_tree.parts(layer_summary.Difference(row.name, row, None) for row in cell.layers)
    total = layer_tree.size(cell.layers)
    most = max((layer_tree.size(group.rows) for group in groups), default=0)
    rows = []
    for group in groups:
        size_bytes, count = layer_tree.size(group.rows), sum(row.parameters for row in group.rows)
        rows.append(
            [
                esc(group.title),
                bar(100 * size_bytes / most if most else 0, "var(--control)")
                + sized(small(size_bytes), size_bytes),
                sized(formatting.percent(size_bytes / total if total else None), size_bytes),
                sized(formatting.parameters(count), count),
                bits(group.rows),
            ]
        )
    return table(
        PART_HEADS, rows, caption=f"Bytes by part of {cell.label}", numeric=range(1, 5), name="layer-parts"
    )
