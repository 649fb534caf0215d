"""The Latency tab: when each token was generated, how evenly, and every metric of time and energy."""

from __future__ import annotations

import gradio as gr

from comparator.core.result import CellResult, Comparison
from comparator.reporting.plots import latency
from comparator.ui.form import Shown
from comparator.ui.markup import esc, note
from comparator.ui.metric_table import metric_table
from comparator.ui.page import Page, html, picture
from comparator.util import formatting
from comparator.util.stats import LEAST_RUNS

EMPTY = "Press Run. Once a variant has answered, this tab shows when each of its tokens was generated."


def build(page: Page) -> None:
    with gr.Tab("Latency", id="latency"):
        intro = html(note(EMPTY))
        with gr.Row(elem_classes="plots", visible=False) as pictures:
            timeline = picture("Tokens over time")
            boxes = picture("Time between two tokens")
        figures = html()
        page.on_comparison(show, [intro, pictures, timeline, boxes, figures], running=True)


def show(shown: Shown):
    comparison = shown.comparison
    if comparison is None:
        return note(EMPTY), gr.Row(visible=False), gr.skip(), gr.skip(), ""
    return (
        note(esc(explained(comparison))),
        gr.Row(visible=True),
        latency.token_timeline(comparison),
        latency.inter_token_box(comparison),
        figures_table(comparison),
    )


def explained(comparison: Comparison) -> str:
    """How to read the plots and how far to trust them."""
    text = (
        "Tokens over time: a line starts at the first token, and its slope is the speed. Time between two tokens: a box holds "
        "the middle half of them."
    )
    runs = comparison.settings.repeats
    if runs > 1:
        text += f" {runs} runs each, alternating; values are medians, the lines show one run."
    if runs < LEAST_RUNS:
        text += (
            f" Speeds are called faster or slower from {LEAST_RUNS} runs on: see Repeats under More settings."
        )
    return text


def figures_table(comparison: Comparison) -> str:
    """Every latency metric that any column has, as an HTML table."""
    last = ("Decode path", "how the decode loop ran, and the kernel that multiplied", _path)
    return metric_table(comparison, "latency", "Latency by variant", last)


def _path(cell: CellResult) -> str:
    return ", ".join(filter(None, (cell.decode_path, cell.kernel))) or formatting.NONE
