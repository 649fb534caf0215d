"""The Layers tab: how weights are stored, the answer to "why uint8?", every tensor, and a diff of two columns."""

from __future__ import annotations

import gradio as gr

from comparator.core.result import CellResult, LayerRow
from comparator.ui import layer_summary
from comparator.ui.form import Shown
from comparator.ui.markup import esc, note, sized, table
from comparator.ui.page import PRIVATE, Choice, Page, html
from comparator.util import formatting

MOST_ROWS = 600  # all tensors of a large mixture of experts would be tens of megabytes of HTML

KIND_HEADS = (
    ("Stored as", "how the values are stored in memory"),
    ("Tensors", ""),
    ("Weights", "number of parameters (logical)"),
    ("Share", "of all weights"),
    ("MB", "10^6 bytes"),
    ("Quant state, MB", "scales and codebooks"),
    ("Bits per weight", "8 × (bytes + quant state) / parameters"),
)
ROW_HEADS = (
    ("Tensor", ""),
    ("Stored as", "hover for the class names"),
    ("param.dtype", "storage dtype and storage shape"),
    ("Shape", "logical shape"),
    ("Compute", "compute dtype of the layer"),
    ("Bits", "bits per weight: 8 × (bytes + quant state) / parameters"),
    ("MB", "10^6 bytes"),
    ("State, MB", "quant state"),
    ("Device", ""),
)
NOTHING = "none"


def build(page: Page) -> None:
    with gr.Tab("Layers", id="layers"):
        with gr.Row(elem_classes="controls", visible=False) as controls:
            column = Choice([], label="Variant", filterable=False, elem_id="layers-column")
            other = Choice([], label="Compare with", filterable=False, elem_id="layers-other")
        summary = html(note("Once a variant has answered, this tab shows how every tensor of it is stored."))
        with gr.Row(elem_classes="controls search", visible=False) as finder:
            search = gr.Textbox(
                "", label="Search tensors", placeholder="layers.0 q_proj, uint8, norm …", elem_id="layers-search",
                max_lines=1, lines=1,
            )  # fmt: skip
            changed = gr.Checkbox(
                True, label="Only differences", visible=False, elem_id="layers-changed", container=False
            )
        rows = html(elem_id="layers-table")

        def listed(shown: Shown, name: str, against: str, query: str, only: bool):
            return view(shown, name, against, query or "", bool(only))

        inputs = [page.shown, column, other, search, changed]
        page.on_comparison(offer, [controls, finder, column, other], running=True)
        # The choices depend on the comparison, and the table on the choices.
        gr.on(
            [page.shown.change, column.change, other.change],
            listed, inputs=inputs, outputs=[summary, rows, changed], trigger_mode="always_last", **PRIVATE,
        )  # fmt: skip
        gr.on(
            [search.change, changed.change],
            lambda *values: listed(*values)[1],
            inputs=inputs, outputs=[rows], trigger_mode="always_last", **PRIVATE,
        )  # fmt: skip


def offer(shown: Shown):
    """The columns to select from. A packed one comes first, since it raises the most questions."""
    names = _names(shown)
    if not names:
        return gr.Row(visible=False), gr.Row(visible=False), gr.skip(), gr.skip()
    packed = (n for n in names if layer_summary.why_the_dtype(_cell(shown, n)))
    quantized = (n for n in names if _quantized(_cell(shown, n)))
    first = next(packed, next(quantized, names[0]))
    return (
        gr.Row(visible=True),
        gr.Row(visible=True),
        gr.Dropdown(choices=names, value=first),
        gr.Dropdown(choices=[NOTHING, *names], value=NOTHING),
    )


def _names(shown: Shown) -> list[str]:
    return [c.label for c in shown.comparison.cells if c.layers] if shown.comparison else []


def _cell(shown: Shown, label: str | None) -> CellResult | None:
    return next((c for c in shown.comparison.cells if c.label == label), None) if shown.comparison else None


def _quantized(cell: CellResult | None) -> bool:
    return cell is not None and any(layer_summary.bits_of(row.logical_dtype) for row in cell.layers)


def view(shown: Shown, name: str, against: str, query: str, only_changed: bool):
    """(summary, table, visibility of "Only differences") for the selected column or pair."""
    left, right = _cell(shown, name), _cell(shown, against)
    if left is None:
        return gr.skip(), gr.skip(), gr.skip()
    if right is None or right is left:
        return summary(left), tensor_table(left, query), gr.Checkbox(visible=False)
    return (
        summary(left) + summary(right),
        diff_table(left, right, query, only_changed),
        gr.Checkbox(visible=True),
    )


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
        + (note(esc(why), "why-uint8") if why else "")
    )


def tensor_table(cell: CellResult, query: str = "") -> str:
    """Every tensor of a column that matches the query."""
    matching = [row for row in cell.layers if layer_summary.matches(_searchable(row), query)]
    several = len({row.device for row in cell.layers}) > 1
    heads = ROW_HEADS if several else ROW_HEADS[:-1]
    rows = [_tensor(row)[: len(heads)] for row in matching[:MOST_ROWS]]
    return table(
        heads,
        rows,
        caption=_counted(len(matching), len(cell.layers), "tensor"),
        numeric=(5, 6, 7),
        name="tensors",
    )


def _searchable(row: LayerRow) -> str:
    return " ".join(
        (row.name, layer_summary.in_words(row), row.module_class, row.param_class, row.storage_dtype, row.logical_dtype,
         row.compute_dtype, row.device, f"tied {row.tied_to}" if row.tied_to else "")
    )  # fmt: skip


def _tensor(row: LayerRow) -> list[str]:
    classes = f"{row.module_class}, {row.param_class}"
    storage = f"tied to {row.tied_to}" if row.tied_to else layer_summary.in_words(row)
    parts = "; ".join(f"{s.name} {s.dtype} {layer_summary.shape(s.shape)}" for s in row.state)
    return [
        f'<code class="tensor">{esc(row.name)}</code>',
        f'<span title="{esc(classes)}">{esc(storage)}</span>',
        f"<code>{esc(row.storage_dtype)}</code> {esc(layer_summary.shape(row.storage_shape))}",
        f'<span title="{esc(row.logical_dtype)}">{esc(layer_summary.shape(row.shape))}</span>',
        f"<code>{esc(row.compute_dtype)}</code>",
        sized(formatting.figure(row.bits_per_weight), row.bits_per_weight),
        sized("tied" if row.tied_to else _small(row.bytes), row.bytes),
        f'<span title="{esc(parts)}">{sized(_small(row.quant_state_bytes) if row.state else formatting.NONE, row.quant_state_bytes)}</span>',
        esc(row.device),
    ]


def _small(value: int | None) -> str:
    """MB with four decimals below 0.01, so that a norm of a kilobyte is not 0.00."""
    if value is None:
        return formatting.NONE
    return f"{value / 1e6:.4f}" if 0 < value < 1e4 else formatting.megabytes(value, unit=False)


def diff_table(left: CellResult, right: CellResult, query: str = "", only_changed: bool = True) -> str:
    """Two columns, tensor by tensor."""
    pairs = layer_summary.diff(left, right)
    matching = [
        pair
        for pair in pairs
        if not (only_changed and pair.same)
        and layer_summary.matches(" ".join(_searchable(r) for r in (pair.left, pair.right) if r), query)
    ]
    heads = (
        ("Tensor", ""),
        (left.label, "how this variant stores it"),
        (right.label, "how this variant stores it"),
        (f"{left.label}, MB", "bytes and quant state"),
        (f"{right.label}, MB", "bytes and quant state"),
        (f"{right.label} / {left.label}", "bytes and quant state"),
    )
    rows = [_pair(pair) for pair in matching[:MOST_ROWS]]
    differ = sum(not pair.same for pair in pairs)
    caption = f"{formatting.plural(differ, 'tensor')} of {len(pairs):,} differ. " + _counted(
        len(matching), len(pairs), "tensor"
    )
    return table(heads, rows, caption=caption, numeric=(3, 4, 5), name="diff")


def _pair(pair: layer_summary.Difference) -> list[str]:
    sizes = [r.bytes + r.quant_state_bytes if r else None for r in (pair.left, pair.right)]
    share = formatting.ratio(sizes[1], sizes[0])
    return [
        f'<code class="tensor">{esc(pair.name)}</code>',
        _storage_cell(pair.left),
        _storage_cell(pair.right),
        sized(_small(sizes[0]), sizes[0]),
        sized(_small(sizes[1]), sizes[1]),
        sized(formatting.times(share) or formatting.NONE, share),
    ]


def _storage_cell(row: LayerRow | None) -> str:
    if row is None:
        return '<span class="soft">missing</span>'
    words = f"tied to {row.tied_to}" if row.tied_to else layer_summary.in_words(row)
    return f'<span title="{esc(f"{row.module_class}, {row.param_class}")}">{esc(words)}</span>'


def _counted(matching: int, all_of_them: int, noun: str) -> str:
    if matching > MOST_ROWS:
        return f"The first {MOST_ROWS:,} of {formatting.plural(matching, noun)}; search to narrow down"
    if matching == all_of_them:
        return formatting.plural(matching, noun)
    return f"{matching:,} of {formatting.plural(all_of_them, noun)}"
