"""The header line: title, device, free memory, queue."""

from __future__ import annotations

import gradio as gr

from comparator.core.state import EngineState
from comparator.sources import logins_are_possible
from comparator.ui.markup import esc
from comparator.ui.page import Page, html
from comparator.ui.panel import cluster
from comparator.ui.theme import ICON
from comparator.util import formatting

REFRESH_S = 4.0


def build(page: Page) -> None:
    with gr.Row(elem_id="head"):
        html(f'<div class="brand">{ICON}<h1>Quant Comparator</h1></div>', elem_id="brand")
        page.status = html(_line("Starting …"), elem_id="status")
        if logins_are_possible():  # elsewhere Gradio's button would log visitors in as the operator
            gr.LoginButton("Log in for gated models", size="sm", elem_id="login", min_width=0, scale=0)


def current() -> str:
    from comparator.engines import get_engine

    return render(get_engine().state())


def render(state: EngineState) -> str:
    """The device, its free memory, and the queue."""
    if not state.ready and not cluster.shown(state):
        return _line("Starting: loading PyTorch in the background. You can already press Run.")
    parts = [f"<b>{esc(state.device)}</b>"]
    if state.free_bytes is not None:
        kind = "GPU memory" if state.gpu else "RAM"
        total = f" of {state.total_bytes / 1e9:,.1f}" if state.total_bytes else ""
        parts.append(f"{state.free_bytes / 1e9:,.1f}{total} GB {kind} free")
    if state.budget_bytes:
        parts.append(f"budget {state.budget_bytes / 1e9:,.1f} GB")
    waiting = f", {formatting.count(state.waiting)} queued" if state.waiting else ""
    busy = f'<span class="dot busy"></span>busy{waiting}' if state.busy else '<span class="dot"></span>idle'
    parts = cluster.head(state, busy) if cluster.shown(state) else [*parts, busy]
    return _line(" · ".join(f'<span class="whole">{part}</span>' for part in parts), markup=True)


def _line(text: str, markup: bool = False) -> str:
    return f'<p class="status">{text if markup else esc(text)}</p>'
