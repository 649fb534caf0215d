"""The head line: what this is, the device, what is free on it, who waits."""

from __future__ import annotations

import gradio as gr

from comparator import words
from comparator.types import EngineState
from comparator.ui.components import cluster
from comparator.ui.markup import esc
from comparator.ui.page import Page
from comparator.ui.theme import ICON

REFRESH_S = 4.0


def build(page: Page) -> None:
    with gr.Row(elem_id="head"):
        gr.HTML(
            f'<div class="brand">{ICON}<h1>Quant Comparator</h1></div>',
            elem_id="brand",
            apply_default_css=False,
        )
        page.status = gr.HTML(_line("Starting …"), elem_id="status", apply_default_css=False)


def current() -> str:
    from comparator.engine import get_engine

    return render(get_engine().state())


def render(state: EngineState) -> str:
    """Device, free memory, the line of waiting comparisons."""
    if not state.ready and not cluster.shown(state):
        return _line("Starting: PyTorch loads in the background. You can press Run already.")
    parts = [f"<b>{esc(state.device)}</b>"]
    if state.free_bytes is not None:
        total = f" of {state.total_bytes / 1e9:,.1f}" if state.total_bytes else ""
        parts.append(f"{state.free_bytes / 1e9:,.1f}{total} GB free")
    if state.budget_bytes:
        parts.append(f"budget {state.budget_bytes / 1e9:,.1f} GB")
    waiting = f", {words.count(state.waiting)} waiting" if state.waiting else ""
    busy = f'<span class="dot busy"></span>busy{waiting}' if state.busy else '<span class="dot"></span>idle'
    parts = cluster.head(state, busy) if cluster.shown(state) else [*parts, busy]
    return _line(" · ".join(f'<span class="whole">{part}</span>' for part in parts), markup=True)


def _line(text: str, markup: bool = False) -> str:
    return f'<p class="status">{text if markup else esc(text)}</p>'
