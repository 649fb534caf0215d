"""The page's table of contents: what is on it, in which order. Each part is a file in panel/, results/, tabs/ or train/.

To add a tab: write tabs/yourtab.py with a `build(page)` and add it to TABS.
"""

from __future__ import annotations

import gradio as gr

from comparator.core.settings import Settings, get_settings
from comparator.deploy.limits import auth_pairs
from comparator.ui import api, handlers
from comparator.ui.admission import Admission
from comparator.ui.form import Shown
from comparator.ui.gradio_compat import (
    bound_unread,
    forget_sessions,
    keep_no_configs,
    poll_queue,
    show_no_progress,
    skip_at_no_cost,
)
from comparator.ui.http_guard import middleware, new_token
from comparator.ui.listeners import LISTENERS, PAGES
from comparator.ui.page import Page, html
from comparator.ui.panel import (
    adapters,
    custom_variant,
    evaluation,
    header,
    model,
    prompt,
    prompt_set,
    residents,
    settings,
    variants,
)
from comparator.ui.results import cards, export, notice, saved_comparison, set_table, share, summary
from comparator.ui.tabs import (
    capacity,
    differences,
    fidelity,
    history,
    latency,
    layers,
    matrix,
    memory,
    train,
    votes,
)
from comparator.ui.theme import appearance
from comparator.ui.train import status as train_status

PANEL = (model, variants, custom_variant, adapters, settings, evaluation, residents)
MAIN = (prompt, prompt_set, saved_comparison, notice, share, train_status, summary, cards, set_table, export)
TABS = (differences, latency, memory, layers, fidelity, matrix, votes, capacity, train, history)
TITLE = "Quant Comparator"
QUEUE_SIZE = (
    64  # least number of events in Gradio's queue; COMPARATOR_QUEUE_SIZE limits the waiting comparisons
)
FILES_MAX_AGE_S = 3600  # of uploads and of files made for a download
SESSIONS = 1000  # pages whose state is kept; the least recently used goes first
UNREAD_SESSIONS = 256  # pages with answers that are not read yet
THREADS = 80  # a waiting visitor can take one each


def build_ui(settings_override: Settings | None = None, admission: Admission | None = None) -> gr.Blocks:
    """The whole page with its event listeners; serve it with `launch_options`. `admission`: one that the caller keeps."""
    chosen = settings_override or get_settings()
    page = Page(chosen, admission or Admission(chosen))
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, FILES_MAX_AGE_S)
    ) as demo:
        page.shown = gr.State(Shown())
        # Hidden: the visitor's key, filled in by their browser; it separates what is theirs from what is others'.
        page.owner = gr.Textbox("", visible="hidden", elem_id="visitor", label="Visitor", container=False)
        header.build(page)
        html(TOGGLE, elem_id="toggle")
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
    # Gradio polls its queue every millisecond, which takes about 6 % of a core all the time; on two cores that slows
    # decoding down. Every 50 ms is fast enough for a person.
    poll_queue(demo, idle_s=0.05, progress_s=0.25)
    keep_no_configs()
    forget_sessions(PAGES.is_over)
    skip_at_no_cost(demo)
    show_no_progress(demo, on=page.owner)
    bound_unread(demo, UNREAD_SESSIONS, LISTENERS.is_reading)
    return demo


# On a phone this button shows and hides the panel; page.js writes the current selection into it.
TOGGLE = (
    '<button type="button" id="panel-toggle" aria-expanded="false" aria-controls="panel">'
    '<span>Model, variants and settings</span><span class="chosen"></span></button>'
)


def launch_options(settings_override: Settings | None = None, token: str | None = None) -> dict:
    """Keyword arguments of `Blocks.launch`: theme, address and security settings.

    `token`: what `http_guard.new_token` returned, for a caller that tells it to the person. Without, where one is
    needed, it is one that nobody knows.
    """
    chosen = settings_override or get_settings()
    return {
        "server_name": chosen.host,
        "server_port": chosen.port or None,
        "max_threads": THREADS,
        "state_session_capacity": SESSIONS,
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,
        "show_error": False,
        "max_file_size": chosen.max_upload_bytes,
        "allowed_paths": [],
        "auth": auth_pairs(chosen),
        "mcp_server": api.mcp_installed(),
        "app_kwargs": {"middleware": middleware(chosen, token or new_token(chosen))},
        "footer_links": [],
        "share": False,
        "pwa": False,
        **appearance(),
    }
