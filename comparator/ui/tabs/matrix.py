"""The Adapters tab: one metric for every variant and adapter, as a heat map and as a table."""

from __future__ import annotations

import gradio as gr

from comparator.metrics.definitions import METRICS
from comparator.reporting.plots import matrix
from comparator.ui.form import Shown
from comparator.ui.markup import code, esc, note, table
from comparator.ui.metric_table import explained, heading
from comparator.ui.page import PRIVATE, Page, html, picture

_WAITING = "Once a variant with an adapter has answered, this tab shows every variant with every adapter."
_EMPTY = "Select an adapter in addition to “none” and press Run to see every variant with every adapter."


def build(page: Page) -> None:
    with gr.Tab("Adapters", id="adapters-tab"):
        intro = html(note(_EMPTY))
        figure = gr.Dropdown([], label="Metric", visible=False, filterable=False, elem_id="matrix-figure")
        with gr.Row(elem_classes="plots", visible=False) as pictures:
            heat = picture("Variants × adapters")
        figures = html()
        page.on_comparison(show, [intro, figure, pictures, heat, figures], running=True)
        figure.input(redraw, inputs=[page.shown, figure], outputs=[heat, figures], **PRIVATE)


def show(shown: Shown):
    comparison = shown.comparison
    choices = matrix.choices(comparison) if comparison else []
    if not choices or not matrix.is_matrix(comparison):
        wanted = shown.running and any(cell.adapter for cell in shown.running.cells)
        text = _WAITING if wanted else _EMPTY
        return note(text), gr.Dropdown(visible=False), gr.Row(visible=False), gr.skip(), ""
    key = choices[0][1]
    heat, figures = redraw(shown, key)
    return (
        note(esc(_intro(comparison))),
        gr.Dropdown(choices, value=key, visible=True),
        gr.Row(visible=True),
        heat,
        figures,
    )


def _intro(comparison) -> str:
    infos = {c.adapter: c.adapter_info for c in comparison.cells if c.adapter and c.adapter_info}
    adapters = [
        f"{name}: {i.kind}" + (f" of rank {i.rank}" if i.rank else "") + f", {i.parameters or 0:,} parameters"
        for name, i in infos.items()
    ]
    return "One base in memory serves all its adapters. " + "; ".join(adapters) + ("." if adapters else "")


def redraw(shown: Shown, key: str):
    if shown.comparison is None or key not in METRICS:
        return gr.skip(), gr.skip()
    heads, rows = matrix.table(shown.comparison, key)
    metric = METRICS[key]
    body = [[code(row[0]), *(esc(text) for text in row[1:])] for row in rows]
    html = table(
        [(head, "") for head in heads],
        body,
        caption=f"{heading(metric)[0]}, by variant and adapter",
        numeric=range(1, len(heads)),
        name="matrix",
    )
    return matrix.heat_map(shown.comparison, key), note(esc(explained(metric))) + html
