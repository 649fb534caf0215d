"""The Memory tab: where the bytes are, what changed at first use, and why transformers reports another number."""

from __future__ import annotations

import gradio as gr

from comparator.core.result import CellResult, Comparison
from comparator.metrics.definitions import METRICS, stored_bytes
from comparator.reporting.plots import memory as plots_memory
from comparator.reporting.plots import style
from comparator.ui.form import Shown
from comparator.ui.markup import esc, note, render
from comparator.ui.metric_table import metric_table
from comparator.ui.page import Page, html, picture
from comparator.util import formatting

FIRST_USE = ("loaded_weight_bytes", "weight_bytes", "loaded_quant_state_bytes", "quant_state_bytes")
FIRST_USE_HEAD = ("Variant", "Weights, as loaded", "after first use", "Quant state, as loaded", "after first use",
                  "Tensors repacked")  # fmt: skip


EMPTY = "Press Run. Once a variant has answered, this tab shows where its bytes are."


def build(page: Page) -> None:
    with gr.Tab("Memory", id="memory"):
        intro = html(note(EMPTY))
        with gr.Row(elem_classes="plots one", visible=False) as pictures:
            bars = picture("Where the bytes are")
        figures = html()
        page.on_comparison(show, [intro, pictures, bars, figures], running=True)


def show(shown: Shown):
    comparison = shown.comparison
    if comparison is None:
        return note(EMPTY), gr.Row(visible=False), gr.skip(), ""
    return (
        note(esc(explained(comparison))),
        gr.Row(visible=True),
        plots_memory.memory_bars(comparison),
        figures_table(comparison) + first_use(comparison) + footprint(comparison),
    )


def explained(comparison: Comparison) -> str:
    sources = formatting.join(
        sorted({c.memory.peak_source for c in comparison.cells if c.memory.peak_source})
    )
    text = "All values in MB (10⁶ bytes), after the warm-up: what actually runs. The diamond is the peak while running"
    text += f", read from the {sources}." if sources else "."
    return " ".join(filter(None, (text, together(comparison))))


def together(comparison: Comparison) -> str:
    """What all variants of the comparison hold when they are resident together; "" where they share nothing."""
    bases = {
        cell.variant: cell.memory
        for cell in comparison.cells
        if cell.memory.resident_bytes is not None and not (cell.adapter or "").endswith(":merged")
    }
    shared = sum(m.shared_bytes or 0 for m in bases.values())
    if not shared:
        return ""
    alone = sum(m.resident_bytes - (m.adapter_bytes or 0) for m in bases.values())
    return (
        f"Together the {len(bases)} variants take {formatting.megabytes(alone - shared)}, {formatting.megabytes(shared)} "
        "less than separately: what all of them leave unquantized (embeddings, head, norms) is stored only once."
    )


def figures_table(comparison: Comparison) -> str:
    """Every memory metric that any column has, as an HTML table."""
    return metric_table(comparison, "memory", "Memory by variant, MB")


def first_use(comparison: Comparison) -> str:
    """As loaded against after the first use, for the columns where a library repacked; "" where none did."""
    rows, texts = [], []
    colours = style.comparison_colours(comparison)
    for cell in comparison.cells:
        values = [METRICS[key].get(cell) for key in FIRST_USE]
        repacked = [row for row in cell.layers if row.loaded]
        if None in values or (values[::2] == values[1::2] and not repacked):
            continue
        written = [(METRICS[key].format(cell), value) for key, value in zip(FIRST_USE, values, strict=True)]
        rows.append((colours[cell.variant], cell.label, written, f"{len(repacked)} of {len(cell.layers)}"))
        texts.append(_repacking(cell, repacked))
    if not rows:
        return ""
    head = [(title, "") for title in FIRST_USE_HEAD]
    text = " ".join(dict.fromkeys(texts))
    return render("first_use.html", head=head, rows=rows, text=text, numeric=set(range(1, 6)))


def _repacking(cell: CellResult, repacked: list) -> str:
    memory = cell.memory
    before, after = memory.loaded_quant_state_bytes, memory.quant_state_bytes
    text = f"{cell.label}: the library rearranged the packed weights for this processor when they were first used"
    if repacked:
        row = repacked[0]
        text += f" ({row.name} from {row.loaded.storage_shape} to {row.storage_shape})"
    if before < after:
        text += (
            f", and undid part of the compression of the scales on the way: {formatting.megabytes(before)} became "
            f"{formatting.megabytes(after)}"
        )
    elif before > after:
        text += (
            f", and its scales shrank from {formatting.megabytes(before)} to {formatting.megabytes(after)}"
        )
    return text + "."


def footprint(comparison: Comparison) -> str:
    """transformers' own number beside ours, and where the difference comes from."""
    lines = []
    for cell in comparison.cells:
        ours, theirs = stored_bytes(cell), cell.memory.footprint_bytes
        if ours is not None and theirs is not None:
            lines.append((cell.label, footprint_words(cell, ours, theirs)))
    return render("footprint.html", lines=lines) if lines else ""


def footprint_words(cell: CellResult, ours: int, theirs: int) -> str:
    """The difference of one column in bytes, and its cause."""
    gap, state = ours - theirs, cell.memory.quant_state_bytes or 0
    if gap == 0:
        return f"returns {formatting.megabytes(theirs)}, the same as measured here."
    text = (
        f"returns {formatting.megabytes(theirs)}; weights and quant state are {formatting.megabytes(ours)}."
    )
    if state and abs(gap - state) <= 0.001 * ours:
        return f"{text} The {formatting.few_bytes(gap)} it leaves out are the quant state."
    if gap > 0:
        other = f", {formatting.few_bytes(min(state, gap))} of them quant state" if state else ""
        return f"{text} It leaves out {formatting.few_bytes(gap)}{other}."
    return f"{text} It counts {formatting.few_bytes(-gap)} more: buffers that are not saved with the model."
