"""One line above the results while an adapter is being trained, whichever tab is open, and the timer behind it.

A training job belongs to the server, not to one page: every page that is open shows it. Empty otherwise.
"""

from __future__ import annotations

import gradio as gr

from comparator.training.types import TrainingState
from comparator.ui.markup import code, esc
from comparator.ui.page import Page, html
from comparator.ui.train.progress import line

REFRESH_S = 1.0


def build(page: Page) -> None:
    page.training = html(elem_id="training")
    page.training_clock = gr.Timer(REFRESH_S, active=False)


def banner(state: TrainingState | None) -> str:
    """The line that stands above the results, whichever tab is open, as long as something is being trained."""
    if state is None or state.over:
        return ""
    text = "Stopping …" if state.stopping else line(state)
    # Only the name is announced: the step changes every second.
    return (
        f'<div class="train-banner"><p role="status"><b>Training {code(state.job)}</b></p>'
        f'<p aria-hidden="true">{esc(text)}</p><button type="button" class="tool" data-tab="Train">Show</button></div>'
    )
