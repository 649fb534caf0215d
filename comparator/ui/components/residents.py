"""What is held in memory between runs, and the button that lets it all go."""

from __future__ import annotations

import gradio as gr

from comparator import words
from comparator.types import EngineState
from comparator.ui.components import cluster
from comparator.ui.markup import code, esc
from comparator.ui.page import Page


def build(page: Page) -> None:
    gr.HTML('<h2 class="section">In memory</h2>', apply_default_css=False)
    page.residents = gr.HTML(render(None), elem_id="residents", apply_default_css=False)
    page.came_back = gr.HTML("", elem_id="came-back", apply_default_css=False)
    page.unload_all = gr.Button(
        "Unload all", size="sm", elem_id="unload-all", visible=not page.settings.public
    )


def current() -> str:
    from comparator.engine import get_engine

    return render(get_engine().state())


def render(state: EngineState | None) -> str:
    """The list of resident variants, by model."""
    if cluster.shown(state):
        return cluster.desk(state)
    models: dict[str, list[str]] = {}
    for held in state.residents if state else ():
        with_others = f", {words.megabytes(held.shared_bytes)} shared" if held.shared_bytes else ""
        line = f"<li>{code(held.variant)}<span>{esc(words.megabytes(held.bytes) + with_others)}</span></li>"
        models.setdefault(held.model, []).append(line)
    return "".join(
        f'<p class="facts">{esc(name)}</p><ul class="residents">{"".join(lines)}</ul>'
        for name, lines in models.items()
    ) or ('<p class="facts">Nothing is loaded.</p>')


def said(came_back: int, what: str) -> str:
    """How much memory came back, as the device tells."""
    return f'<p class="facts" role="status">{esc(what)}: {esc(words.megabytes(came_back))} came back.</p>'


NOT_HERE = '<p class="facts" role="status">Everybody here shares what is in memory, so the server makes room by itself.</p>'


def unloader(public: bool):
    """What “Unload all” does: on a public server, nothing, since others may be using what is there."""

    def unload_all() -> str:
        from comparator.engine import get_engine

        return NOT_HERE if public else said(get_engine().unload(None), "Unloaded all")

    return unload_all
