"""The Memory tab: where the bytes are, what changed at first use, and why transformers prints another figure."""

from __future__ import annotations

import gradio as gr

from comparator import devices, plots, words
from comparator.figures import reference_of
from comparator.types import CellResult, Comparison
from comparator.ui.markup import code, compared, esc, note, sized, swatch, table
from comparator.ui.page import Page, picture
from comparator.ui.state import Shown

HEADS = (
    ("Column", ""),
    ("Weights", "parameters and buffers as they are stored, each storage once"),
    ("Quant state", "scales, codebooks, zeros: what turns packed values back into numbers"),
    ("Both", "weights and quant state together"),
    ("Resident", "everything the variant holds on its device after the warm-up"),
    ("Shared", "of what is resident: held by a variant loaded earlier too, one storage for both"),
    ("KV cache", "keys and values of prompt and answer at the end of the run"),
    ("Peak, loading", "the highest use while it loaded"),
    ("Peak, running", "the highest use while it answered"),
    ("get_memory_footprint()", "what transformers prints, and most tutorials with it"),
)


def build(page: Page) -> None:
    with gr.Tab("Memory", id="memory"):
        intro = gr.HTML(note("Run a comparison to see where the bytes are."), apply_default_css=False)
        with gr.Row(elem_classes="plots one", visible=False) as pictures:
            bars = picture("Where the bytes are")
        figures = gr.HTML("", apply_default_css=False)
        page.on_comparison(show, [intro, pictures, bars, figures])


def show(shown: Shown):
    comparison = shown.comparison
    if comparison is None:
        return gr.skip(), gr.skip(), gr.skip(), gr.skip()
    return (
        note(esc(explained(comparison))),
        gr.Row(visible=True),
        plots.memory_bars(comparison),
        figures_table(comparison) + first_use(comparison) + footprint(comparison),
    )


def explained(comparison: Comparison) -> str:
    sources = words.join(sorted({c.memory.peak_source for c in comparison.cells if c.memory.peak_source}))
    text = "All figures in MB (10⁶ bytes), after the warm-up: what actually runs. The diamond is the peak while running"
    text += f", read from the {sources}." if sources else "."
    return " ".join(filter(None, (text, together(comparison))))


def together(comparison: Comparison) -> str:
    """What all bases of the comparison hold when they are resident together; "" where they share nothing."""
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
        f"The {len(bases)} variants hold {words.megabytes(alone - shared)} together, {words.megabytes(shared)} less than "
        "each alone: what they leave unquantized alike (embeddings, head, norms) is one storage for all of them."
    )


def figures_table(comparison: Comparison) -> str:
    named = plots.comparison_colours(comparison)
    rows = [_row(cell, reference_of(comparison, cell), named[cell.variant]) for cell in comparison.cells]
    return table(HEADS, rows, caption="Memory by column, MB", numeric=range(1, 10), name="memory")


def _row(cell: CellResult, reference: CellResult | None, colour: str) -> list[str]:
    mine, theirs = cell.memory, reference.memory if reference else None
    mark = devices.mark(cell, reference)

    def plain(value: int | None) -> str:
        return sized(words.megabytes(value, unit=False), value)

    def beside(name: str) -> str:
        value = getattr(mine, name)
        share = words.ratio(value, getattr(theirs, name) if theirs else None)
        return compared(words.megabytes(value, unit=False), share, key=value, mark=mark)

    both = _both(cell)
    return [
        swatch(colour) + code(cell.label),
        plain(mine.weight_bytes),
        plain(mine.quant_state_bytes),
        compared(
            words.megabytes(both, unit=False),
            words.ratio(both, _both(reference) if reference else None),
            key=both,
        ),
        beside("resident_bytes"),
        plain(mine.shared_bytes),
        plain(mine.kv_cache_bytes),
        plain(mine.load_peak_bytes),
        beside("run_peak_bytes"),
        plain(mine.footprint_bytes),
    ]


def _both(cell: CellResult) -> int | None:
    parts = (cell.memory.weight_bytes, cell.memory.quant_state_bytes)
    return None if parts[0] is None else parts[0] + (parts[1] or 0)


def first_use(comparison: Comparison) -> str:
    """As loaded against after the first use, for the columns where a library repacked; "" where none did."""
    rows, said = [], []
    named = plots.comparison_colours(comparison)
    for cell in comparison.cells:
        memory = cell.memory
        before = (memory.loaded_weight_bytes, memory.loaded_quant_state_bytes)
        after = (memory.weight_bytes, memory.quant_state_bytes)
        repacked = [row for row in cell.layers if row.loaded]
        if None in (*before, *after) or (before == after and not repacked):
            continue
        rows.append(
            [
                swatch(named[cell.variant]) + code(cell.label),
                *(
                    sized(words.megabytes(value, unit=False), value)
                    for pair in zip(before, after, strict=True)
                    for value in pair
                ),
                esc(f"{len(repacked)} of {len(cell.layers)}"),
            ]
        )
        said.append(_in_words(cell, repacked))
    if not rows:
        return ""
    heads = (
        ("Column", ""),
        ("Weights, as loaded", ""),
        ("after first use", ""),
        ("Quant state, as loaded", ""),
        ("after first use", ""),
        ("Tensors repacked", ""),
    )
    return (
        "<h3>As loaded, and after the first use</h3>"
        + note(esc(" ".join(dict.fromkeys(said))))
        + table(
            heads, rows, caption="Before and after the first use, MB", numeric=range(1, 6), name="first-use"
        )
    )


def _in_words(cell: CellResult, repacked: list) -> str:
    memory = cell.memory
    before, after = memory.loaded_quant_state_bytes, memory.quant_state_bytes
    text = f"{cell.label}: the library rearranged the packed weights for this processor when they were first used"
    if repacked:
        row = repacked[0]
        text += f" ({row.name} from {row.loaded.storage_shape} to {row.storage_shape})"
    if before < after:
        text += (
            f", and undid part of the compression of the scales on the way: {words.megabytes(before)} became "
            f"{words.megabytes(after)}"
        )
    elif before > after:
        text += f", and its scales shrank from {words.megabytes(before)} to {words.megabytes(after)}"
    return text + "."


def footprint(comparison: Comparison) -> str:
    """transformers' own figure beside ours, and where the difference comes from."""
    lines = []
    for cell in comparison.cells:
        both, theirs = _both(cell), cell.memory.footprint_bytes
        if both is None or theirs is None:
            continue
        lines.append(f"<li>{code(cell.label)} {esc(footprint_words(cell, both, theirs))}</li>")
    if not lines:
        return ""
    return (
        "<h3>Why get_memory_footprint() says something else</h3>"
        + note(
            "transformers adds up parameters and buffers. It does not see what bitsandbytes keeps beside a weight "
            "(absmax, codebooks, SCB), so nf4 with and without double quantization look the same to it."
        )
        + f'<ul class="plain">{"".join(lines)}</ul>'
    )


def footprint_words(cell: CellResult, both: int, theirs: int) -> str:
    """One column's difference, in words and in bytes."""
    gap, state = both - theirs, cell.memory.quant_state_bytes or 0
    if gap == 0:
        return f"prints {words.megabytes(theirs)}, which is what is there."
    text = f"prints {words.megabytes(theirs)}; weights and quant state are {words.megabytes(both)}."
    if state and abs(gap - state) <= 0.001 * both:
        return f"{text} The {words.few_bytes(gap)} it leaves out are the quant state."
    if gap > 0:
        other = f", {words.few_bytes(min(state, gap))} of them quant state" if state else ""
        return f"{text} It leaves out {words.few_bytes(gap)}{other}."
    return f"{text} It counts {words.few_bytes(-gap)} more: buffers that are no part of what is saved."
