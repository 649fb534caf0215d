"""Settings: what fidelity is measured on. The reference's own answer, a longer text too, or nothing."""

from __future__ import annotations

import gradio as gr

from comparator.types import EvalSettings
from comparator.ui.page import Page

MODES = (("this answer", "prompt"), ("and a longer text", "text"), ("off", "none"))
_FIRST = EvalSettings()


def build(page: Page) -> None:
    with gr.Accordion("Fidelity", open=False, elem_classes="fold", elem_id="fidelity-settings"):
        page.fields["fidelity"] = gr.Radio(
            list(MODES),
            value="prompt",
            label="Measured on",
            info="A longer text takes about a minute a column for the built-in model on two CPU cores.",
            elem_id="set-fidelity",
        )
        page.fields["eval_text"] = gr.Textbox(
            "",
            label="The longer text",
            lines=2,
            max_lines=8,
            placeholder="empty: the text that comes with this project",
            elem_id="set-eval-text",
        )
        with gr.Row(elem_classes="pair"):
            page.fields["context"] = gr.Number(
                _FIRST.context,
                label="Context",
                info="tokens at once",
                step=1,
                min_width=80,
                elem_id="set-context",
            )
            page.fields["stride"] = gr.Number(
                _FIRST.stride, label="Stride", info="to the next", step=1, min_width=80, elem_id="set-stride"
            )
