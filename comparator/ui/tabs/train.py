"""The Train tab: train a LoRA on a quantized base, and compare it on every variant.

From top to bottom: base, data and settings (`train/setup`), the run (`train/run`), the trained adapters (`train/trained`, `train/evaluation`, `train/publish`).
If training is disabled, for example on a public server, it only says why.
"""

from __future__ import annotations

import gradio as gr

from comparator.engines import get_trainings
from comparator.ui.gradio_compat import current_blocks
from comparator.ui.page import Page, html
from comparator.ui.train import preview, setup, trained
from comparator.ui.train import run as train_run


def build(page: Page) -> None:
    with gr.Tab("Train", id="train") as tab:
        reason = get_trainings().refusal()
        if reason:
            html(preview.unavailable(reason), elem_id="train-refused")
            return
        fields = setup.build(page, tab)
        watch = train_run.build(page)
        panel = trained.build(page)
    train_run.wire(page, tab, fields, watch, panel, current_blocks())
