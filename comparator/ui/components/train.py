"""The Train tab: train a LoRA on a quantized base, and see it in the matrix at once.

From top to bottom: base, data and settings (`train_before`), the run (`train_run`), what came of it (`train_after`).
Where nothing is trained, a public server for instance, it says why and shows nothing else.
"""

from __future__ import annotations

import gradio as gr

from comparator.training import jobs
from comparator.ui.components import train_after, train_before, train_data, train_run
from comparator.ui.page import Page


def build(page: Page) -> None:
    with gr.Tab("Train", id="train") as tab:
        reason = jobs.get_trainings().refusal()
        if reason:
            gr.HTML(train_data.not_here(reason), elem_id="train-refused", apply_default_css=False)
            return
        asking = train_before.build(page, tab)
        watch = train_run.build(page)
        after = train_after.build(page)
    train_run.wire(page, tab, asking, watch, after, gr.context.Context.root_block)
