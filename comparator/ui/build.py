"""The page's table of contents: what is on it, in which order. Each part is a file in components/.

To add a tab: write components/yourtab.py with a `build(page)` and add it to TABS.
"""

from __future__ import annotations

import gradio as gr
from starlette.middleware import Middleware

from comparator.limits import auth_pairs
from comparator.settings import Settings, get_settings
from comparator.ui import api, handlers
from comparator.ui.components import (
    adapters,
    cards,
    custom,
    evaluation,
    fidelity,
    header,
    history,
    latency,
    layers,
    matrix,
    memory,
    model,
    notice,
    prompt,
    recording,
    residents,
    settings,
    share,
    summary,
    train,
    training,
    variants,
)
from comparator.ui.desk import Desk
from comparator.ui.origin import OwnOrigin
from comparator.ui.page import Page
from comparator.ui.state import Shown
from comparator.ui.theme import appearance

PANEL = (model, variants, custom, adapters, settings, evaluation, residents)
MAIN = (prompt, recording, notice, share, training, summary, cards)
TABS = (latency, memory, layers, fidelity, matrix, train, history)
TITLE = "Quant Comparator"
QUEUE_SIZE = (
    64  # events that Gradio holds at least; how many comparisons may wait, COMPARATOR_QUEUE_SIZE says
)
FILES_KEPT_S = 3600  # what was uploaded, or made for a download
THREADS = 80  # each waiting visitor may hold one


def build_ui(given: Settings | None = None) -> gr.Blocks:
    """The whole page, wired; `launch_options` says how to serve it."""
    chosen = given or get_settings()
    page = Page(chosen, Desk(chosen))
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, FILES_KEPT_S)
    ) as demo:
        page.shown = gr.State(Shown())
        header.build(page)
        gr.HTML(TOGGLE, elem_id="toggle", apply_default_css=False)
        with gr.Row(elem_id="body"):
            with gr.Column(elem_id="panel", scale=0):
                for part in PANEL:
                    part.build(page)
            with gr.Column(elem_id="main", scale=1):
                for part in MAIN:
                    part.build(page)
                with gr.Tabs(elem_id="tabs"):
                    for tab in TABS:
                        tab.build(page)
        handlers.wire(page, demo)
        api.build(page)
    demo.queue(max_size=max(QUEUE_SIZE, 2 * chosen.queue_size))
    # Gradio looks for new work every millisecond, which takes some 6 % of a core for good; on two cores that is
    # decode speed. Every 50 ms is soon enough for a person.
    demo._queue.sleep_when_free = 0.05
    demo._queue.progress_update_sleep_when_free = 0.25
    return demo


# On a phone the panel folds away behind this; page.js opens it and writes what is chosen into it.
TOGGLE = (
    '<button type="button" id="panel-toggle" aria-expanded="false" aria-controls="panel">'
    '<span>Model, variants and settings</span><span class="chosen"></span></button>'
)


def launch_options(given: Settings | None = None) -> dict:
    """Keyword arguments of `Blocks.launch`: the look, and what keeps the page safe."""
    chosen = given or get_settings()
    return {
        "server_name": chosen.host,
        "server_port": chosen.port or None,
        "max_threads": THREADS,
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,
        "show_error": False,
        "max_file_size": chosen.max_upload_bytes,
        "allowed_paths": [],
        "auth": auth_pairs(chosen),
        "mcp_server": api.mcp_installed(),
        "app_kwargs": {
            "middleware": [Middleware(OwnOrigin, behind_proxy=chosen.behind_proxy)] if chosen.public else []
        },
        "footer_links": [],
        "share": False,
        "pwa": False,
        **appearance(),
    }
