"""One line above the results as long as something is being trained, whichever tab is open; and the clock that asks.

A training belongs to the program, not to a page: whoever opens the page finds it here. Shows nothing otherwise.
"""

from __future__ import annotations

import gradio as gr

from comparator.ui.page import Page

EVERY_S = 1.0


def build(page: Page) -> None:
    page.training = gr.HTML("", elem_id="training", apply_default_css=False)
    page.training_clock = gr.Timer(EVERY_S, active=False)
