"""The Adapters tab: one figure for every variant and adapter, as a heat map and as a table."""

from __future__ import annotations

import gradio as gr

from comparator import plots_matrix
from comparator.figures import BY_KEY
from comparator.ui.markup import code, esc, note, table
from comparator.ui.page import PRIVATE, Page, picture
from comparator.ui.state import Shown

_EMPTY = "Tick an adapter beside “none” and run: here every variant stands against every adapter."


def build(page: Page) -> None:
    with gr.Tab("Adapters", id="adapters-tab"):
        intro = gr.HTML(note(_EMPTY), apply_default_css=False)
        figure = gr.Dropdown([], label="Figure", visible=False, filterable=False, elem_id="matrix-figure")
        with gr.Row(elem_classes="plots", visible=False) as pictures:
            heat = picture("Variants × adapters")
        figures = gr.HTML("", apply_default_css=False)
        page.on_comparison(show, [intro, figure, pictures, heat, figures])
        figure.input(redraw, inputs=[page.shown, figure], outputs=[heat, figures], **PRIVATE)


def show(shown: Shown):
    comparison = shown.comparison
    if comparison is None:
        return (gr.skip(),) * 5
    choices = plots_matrix.choices(comparison)
    if not plots_matrix.is_matrix(comparison) or not choices:
        return note(_EMPTY), gr.Dropdown(visible=False), gr.Row(visible=False), gr.skip(), ""
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
    told = [
        f"{name}: {i.kind}"
        + (f" of rank {i.rank}" if i.rank else "")
        + f", {(i.parameters or 0):,} parameters"
        for name, i in infos.items()
    ]
    return "One base in memory serves all its adapters. " + "; ".join(told) + ("." if told else "")


def redraw(shown: Shown, key: str):
    if shown.comparison is None or key not in BY_KEY:
        return gr.skip(), gr.skip()
    heads, rows = plots_matrix.table(shown.comparison, key)
    kind = BY_KEY[key]
    body = [[code(row[0]), *(esc(text) for text in row[1:])] for row in rows]
    html = table(
        [(head, "") for head in heads],
        body,
        caption=f"{kind.title}{', ' + kind.unit if kind.unit else ''}, by variant and adapter",
        numeric=range(1, len(heads)),
        name="matrix",
    )
    return plots_matrix.heat_map(shown.comparison, key), note(esc(kind.help)) + html
