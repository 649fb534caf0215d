"""The variants that stay in memory between runs, and the button that unloads them."""

from __future__ import annotations

from dataclasses import replace

import gradio as gr

from comparator.core.settings import get_settings
from comparator.core.state import EngineState
from comparator.ui.markup import code, esc
from comparator.ui.page import Page, html
from comparator.ui.panel import cluster
from comparator.util import formatting


def build(page: Page) -> None:
    html('<h2 class="section">In memory</h2>')
    page.residents = html(render(None), elem_id="residents")
    page.unload_status = html(elem_id="came-back")
    page.unload_all = gr.Button(
        "Unload all", size="sm", elem_id="unload-all", visible=not page.settings.public
    )


def current() -> str:
    from comparator.engines import get_engine

    return render(get_engine().state(), get_settings().public)


def render(state: EngineState | None, public: bool = False) -> str:
    """The list of resident variants, by model; in public mode their number."""
    if cluster.shown(state):
        return cluster.nodes(replace(state, residents=()) if public else state)
    if public:  # what others load is theirs: the head line says how much memory is left
        return f'<p class="facts">{formatting.plural(len(state.residents) if state else 0, "variant")} of all visitors in memory.</p>'
    models: dict[str, list[str]] = {}
    for resident in state.residents if state else ():
        shared = f", {formatting.megabytes(resident.shared_bytes)} shared" if resident.shared_bytes else ""
        line = f"<li>{code(resident.variant)}<span>{esc(formatting.megabytes(resident.bytes or None) + shared)}</span></li>"
        models.setdefault(resident.model, []).append(line)
    return "".join(
        f'<p class="facts">{esc(name)}</p><ul class="residents">{"".join(lines)}</ul>'
        for name, lines in models.items()
    ) or ('<p class="facts">No model is loaded.</p>')


def freed_line(freed: int, action: str) -> str:
    """How much memory an action freed, as measured on the device."""
    return f'<p class="facts" role="status">{esc(action)}: {esc(formatting.megabytes(freed))} freed.</p>'


NOT_HERE = (
    '<p class="facts" role="status">All visitors share these models, so only the server unloads them.</p>'
)


def unloader(public: bool):
    """The handler of “Unload all”: does nothing on a public server, where others may use the models."""

    def unload_all() -> str:
        from comparator.engines import get_engine

        return NOT_HERE if public else freed_line(get_engine().unload(None), "Unloaded all")

    return unload_all
