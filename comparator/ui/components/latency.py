"""The Latency tab: when each token came, how evenly, and the figures behind the pictures."""

from __future__ import annotations

import gradio as gr

from comparator import devices, plots, words
from comparator.figures import floor_share, python_s, reference_of
from comparator.types import CellResult, Comparison
from comparator.ui.markup import code, compared, esc, note, sized, swatch, table
from comparator.ui.page import Page, picture
from comparator.ui.state import Shown

HEADS = (
    ("Column", ""),
    ("Load, s", "from the checkpoint to the device; – where it was resident already"),
    ("Prepare, s", "warm-up: what runs once before anything is timed"),
    ("First token, ms", "TTFT: from the prompt's tokens to the first new one"),
    ("Prefill, tok/s", "prompt tokens over the time to the first token"),
    ("Decode, tok/s", "tokens after the first over the time they took; median of the repeats"),
    ("p50, ms", "half of the gaps between two tokens are shorter"),
    ("p90, ms", "nine of ten gaps are shorter"),
    ("p99, ms", "99 of 100 gaps are shorter"),
    ("Total, s", "from the prompt to the last token"),
    ("Decoding", "how the loop ran, and what multiplied"),
)


# Shown where at least one column has them: (head, the figure, its factor to the shown unit).
EXTRAS = (
    (
        ("Of the floor, %", "decode rate over what reading the weights once a token allows on this GPU"),
        floor_share,
        100,
    ),
    (
        ("Eager, tok/s", "the same answer decoded step by step from Python, as plain transformers does"),
        lambda cell: cell.latency.eager_decode_tok_s,
        1,
    ),
    (("Python costs, ms", "a token, decoded eagerly, takes so much longer"), python_s, 1e3),
)


def build(page: Page) -> None:
    with gr.Tab("Latency", id="latency"):
        intro = gr.HTML(note("Run a comparison to see when each token came."), apply_default_css=False)
        with gr.Row(elem_classes="plots", visible=False) as pictures:
            timeline = picture("Tokens over time")
            boxes = picture("Time between two tokens")
        figures = gr.HTML("", apply_default_css=False)
        page.on_comparison(show, [intro, pictures, timeline, boxes, figures])


def show(shown: Shown):
    comparison = shown.comparison
    if comparison is None:
        return gr.skip(), gr.skip(), gr.skip(), gr.skip(), gr.skip()
    return (
        note(esc(explained(comparison))),
        gr.Row(visible=True),
        plots.token_timeline(comparison),
        plots.inter_token_box(comparison),
        figures_table(comparison),
    )


def explained(comparison: Comparison) -> str:
    """What the pictures say and how far one may trust them."""
    text = (
        "Left: a line starts at the first token and its slope is the speed. Right: the time between two tokens; a box "
        "holds the middle half of them."
    )
    if comparison.settings.repeats > 1:
        return text + (
            f" {comparison.settings.repeats} runs each, taking turns; figures are medians, the lines show one run. "
            "Where the runs' ranges overlap the page says “can't tell”."
        )
    return text + " One run each: set Repeats under Settings to see which differences hold."


def figures_table(comparison: Comparison) -> str:
    named = plots.comparison_colours(comparison)
    more = [extra for extra in EXTRAS if any(extra[1](cell) is not None for cell in comparison.cells)]
    rows = [
        _row(cell, reference_of(comparison, cell), named[cell.variant], more) for cell in comparison.cells
    ]
    heads = (*HEADS[:6], *(head for head, _, _ in more), *HEADS[6:])
    return table(heads, rows, caption="Latency by column", numeric=range(1, 10 + len(more)), name="latency")


def _row(cell: CellResult, reference: CellResult | None, colour: str, more: list) -> list[str]:
    mine, theirs = cell.latency, reference.latency if reference else None
    mark = devices.mark(cell, reference)

    def ms(name: str) -> str:
        value = getattr(mine, name)
        share = words.ratio(value, getattr(theirs, name) if theirs else None)
        return compared(words.figure(None if value is None else value * 1e3), share, key=value, mark=mark)

    def rate(name: str) -> str:
        value = getattr(mine, name)
        return compared(
            words.figure(value),
            words.ratio(value, getattr(theirs, name) if theirs else None),
            key=value,
            mark=mark,
        )

    runs = [r.decode_tok_s for r in mine.runs if r.decode_tok_s is not None]
    spread = f" ({words.figure(min(runs))} to {words.figure(max(runs))})" if len(runs) > 1 else ""
    path = ", ".join(p for p in (cell.decode_path or "", cell.kernel or "") if p) or words.NONE
    return [
        swatch(colour) + code(cell.label),
        sized(words.figure(mine.load_s), mine.load_s),
        sized(words.figure(mine.prepare_s), mine.prepare_s),
        ms("ttft_s"),
        rate("prefill_tok_s"),
        rate("decode_tok_s") + esc(spread),
        *(_extra(get(cell), factor) for _, get, factor in more),
        ms("itl_p50_s"),
        ms("itl_p90_s"),
        ms("itl_p99_s"),
        sized(words.figure(mine.total_s), mine.total_s),
        esc(path),
    ]


def _extra(value: float | None, factor: float) -> str:
    return sized(words.figure(None if value is None else value * factor), value)
