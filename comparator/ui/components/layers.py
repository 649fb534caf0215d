"""The Layers tab: what is stored as what, the answer to "why uint8?", every tensor, and two columns side by side."""

from __future__ import annotations

import gradio as gr

from comparator import words
from comparator.types import CellResult, LayerRow
from comparator.ui import stored
from comparator.ui.markup import esc, note, sized, table
from comparator.ui.page import PRIVATE, Choice, Page
from comparator.ui.state import Shown

MOST_ROWS = 600  # a table of all of a large mixture of experts would be tens of megabytes of markup

KIND_HEADS = (
    ("Kept as", "how the values lie in memory"),
    ("Tensors", ""),
    ("Weights", "parameters, as the model means them"),
    ("Share", "of all weights"),
    ("MB", "10^6 bytes"),
    ("Quant state, MB", "scales and codebooks"),
    ("Bits a weight", "bytes and quant state over the weights"),
)
ROW_HEADS = (
    ("Tensor", ""),
    ("Kept as", "hover for the class names"),
    ("dtype says", "param.dtype, and the shape it is stored in"),
    ("Shape", "as the model means it"),
    ("Computes in", "the dtype in which the layer multiplies"),
    ("Bits", "bits a weight: 8 × (bytes + quant state) / parameters"),
    ("MB", "10^6 bytes"),
    ("State, MB", "quant state"),
    ("Where", "device"),
)
NOTHING = "nothing"


def build(page: Page) -> None:
    with gr.Tab("Layers", id="layers"):
        with gr.Row(elem_classes="controls", visible=False) as controls:
            column = Choice([], label="Column", filterable=False, elem_id="layers-column")
            other = Choice([], label="Compare with", filterable=False, elem_id="layers-other")
        summary = gr.HTML(note("Run a comparison to see how every tensor is kept."), apply_default_css=False)
        with gr.Row(elem_classes="controls search", visible=False) as finder:
            search = gr.Textbox(
                "", label="Search tensors", placeholder="layers.0 q_proj, uint8, norm …", elem_id="layers-search",
                max_lines=1, lines=1,
            )  # fmt: skip
            changed = gr.Checkbox(
                True, label="Only what differs", visible=False, elem_id="layers-changed", container=False
            )
        rows = gr.HTML("", elem_id="layers-table", apply_default_css=False)

        def listed(shown: Shown, name: str, against: str, query: str, only: bool):
            return view(shown, name, against, query or "", bool(only))

        inputs = [page.shown, column, other, search, changed]
        page.on_comparison(offer, [controls, finder, column, other])
        # The choices change with the comparison, and the table with the choices.
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
    """The columns that can be looked at. A packed one is shown first, because that is what people ask about."""
    names = _names(shown)
    if not names:
        return gr.Row(visible=False), gr.Row(visible=False), gr.skip(), gr.skip()
    packed = (n for n in names if stored.why_the_dtype(_cell(shown, n)))
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
    return cell is not None and any(stored.bits_of(row.logical_dtype) for row in cell.layers)


def view(shown: Shown, name: str, against: str, query: str, only_changed: bool):
    """(summary, table, whether the box "only what differs" is there) for the chosen column or pair."""
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
    """What is stored as what, in a sentence and a small table; the uint8 question where it arises."""
    groups = stored.kinds(cell.layers)
    total = sum(k.parameters for k in groups)
    rows = [
        [
            f'<span title="{esc(", ".join(k.module_classes))}">{esc(k.words)}</span>',
            sized(words.count(k.tensors), k.tensors),
            sized(words.parameters(k.parameters), k.parameters),
            sized(words.percent(k.parameters / total if total else None), k.parameters),
            sized(words.megabytes(k.bytes, unit=False), k.bytes),
            sized(words.megabytes(k.quant_state_bytes, unit=False), k.quant_state_bytes),
            sized(words.figure(k.bits_per_weight), k.bits_per_weight),
        ]
        for k in groups
    ]
    why = stored.why_the_dtype(cell)
    return (
        f"<h3>{esc(cell.label)}: what is stored as what</h3>"
        + note(esc(stored.headline(cell)))
        + table(
            KIND_HEADS, rows, caption=f"Kinds of storage in {cell.label}", numeric=range(1, 7), name="kinds"
        )
        + (note(esc(why), "why-uint8") if why else "")
    )


def tensor_table(cell: CellResult, query: str = "") -> str:
    """Every tensor of a column that fits the query."""
    found = [row for row in cell.layers if stored.matches(_searchable(row), query)]
    several = len({row.device for row in cell.layers}) > 1
    heads = ROW_HEADS if several else ROW_HEADS[:-1]
    rows = [_tensor(row)[: len(heads)] for row in found[:MOST_ROWS]]
    return table(
        heads,
        rows,
        caption=_counted(len(found), len(cell.layers), "tensor"),
        numeric=(5, 6, 7),
        name="tensors",
    )


def _searchable(row: LayerRow) -> str:
    return " ".join(
        (row.name, stored.in_words(row), row.module_class, row.param_class, row.storage_dtype, row.logical_dtype,
         row.compute_dtype, row.device, f"tied {row.tied_to}" if row.tied_to else "")
    )  # fmt: skip


def _tensor(row: LayerRow) -> list[str]:
    classes = f"{row.module_class}, {row.param_class}"
    kept = f"the same bytes as {row.tied_to}" if row.tied_to else stored.in_words(row)
    parts = "; ".join(f"{s.name} {s.dtype} {stored.shape(s.shape)}" for s in row.state)
    return [
        f'<code class="tensor">{esc(row.name)}</code>',
        f'<span title="{esc(classes)}">{esc(kept)}</span>',
        f"<code>{esc(row.storage_dtype)}</code> {esc(stored.shape(row.storage_shape))}",
        f'<span title="{esc(row.logical_dtype)}">{esc(stored.shape(row.shape))}</span>',
        f"<code>{esc(row.compute_dtype)}</code>",
        sized(words.figure(row.bits_per_weight), row.bits_per_weight),
        sized("tied" if row.tied_to else _small(row.bytes), row.bytes),
        f'<span title="{esc(parts)}">{sized(_small(row.quant_state_bytes) if row.state else words.NONE, row.quant_state_bytes)}</span>',
        esc(row.device),
    ]


def _small(value: int | None) -> str:
    """MB with four decimals below 0.01, so that a norm of a kilobyte is not 0.00."""
    if value is None:
        return words.NONE
    return f"{value / 1e6:.4f}" if 0 < value < 1e4 else words.megabytes(value, unit=False)


def diff_table(left: CellResult, right: CellResult, query: str = "", only_changed: bool = True) -> str:
    """Two columns, tensor by tensor."""
    pairs = stored.diff(left, right)
    found = [
        pair
        for pair in pairs
        if not (only_changed and pair.same)
        and stored.matches(" ".join(_searchable(r) for r in (pair.left, pair.right) if r), query)
    ]
    heads = (
        ("Tensor", ""),
        (left.label, "how this column keeps it"),
        (right.label, "how this column keeps it"),
        (f"{left.label}, MB", "bytes and quant state"),
        (f"{right.label}, MB", "bytes and quant state"),
        (f"{right.label} / {left.label}", "bytes and quant state"),
    )
    rows = [_pair(pair) for pair in found[:MOST_ROWS]]
    differ = sum(not pair.same for pair in pairs)
    caption = f"{words.plural(differ, 'tensor')} of {len(pairs):,} differ. " + _counted(
        len(found), len(pairs), "tensor"
    )
    return table(heads, rows, caption=caption, numeric=(3, 4, 5), name="diff")


def _pair(pair: stored.Difference) -> list[str]:
    sizes = [r.bytes + r.quant_state_bytes if r else None for r in (pair.left, pair.right)]
    share = words.ratio(sizes[1], sizes[0])
    return [
        f'<code class="tensor">{esc(pair.name)}</code>',
        _kept(pair.left),
        _kept(pair.right),
        sized(_small(sizes[0]), sizes[0]),
        sized(_small(sizes[1]), sizes[1]),
        sized(words.times(share) or words.NONE, share),
    ]


def _kept(row: LayerRow | None) -> str:
    if row is None:
        return '<span class="soft">not there</span>'
    said = f"the same bytes as {row.tied_to}" if row.tied_to else stored.in_words(row)
    return f'<span title="{esc(f"{row.module_class}, {row.param_class}")}">{esc(said)}</span>'


def _counted(found: int, all_of_them: int, noun: str) -> str:
    if found > MOST_ROWS:
        return f"The first {MOST_ROWS:,} of {words.plural(found, noun)}; search to narrow them down"
    if found == all_of_them:
        return words.plural(found, noun)
    return f"{found:,} of {words.plural(all_of_them, noun)}"
