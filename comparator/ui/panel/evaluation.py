"""Settings: what fidelity is measured on: the reference's answer, an evaluation text as well, or nothing."""

from __future__ import annotations

import gradio as gr

from comparator.core.request import EvalSettings
from comparator.ui.page import Page

MODES = (("this answer", "prompt"), ("this answer and a text", "text"), ("off", "none"))
_FIRST = EvalSettings()


def build(page: Page) -> None:
    with gr.Accordion("Fidelity", open=False, elem_classes="fold", elem_id="fidelity-settings"):
        page.fields["fidelity"] = gr.Radio(
            list(MODES),
            value="prompt",
            label="Measure on",
            info="A text takes about a minute per variant (built-in model, two CPU cores).",
            elem_id="set-fidelity",
        )
        page.fields["eval_text"] = gr.Textbox(
            "",
            label="Evaluation text",
            lines=2,
            max_lines=8,
            placeholder="leave empty for the bundled text",
            elem_id="set-eval-text",
        )
        with gr.Row(elem_classes="pair"):
            page.fields["context"] = gr.Number(
                _FIRST.context,
                label="Context",
                info="tokens per window",
                step=1,
                min_width=80,
                elem_id="set-context",
            )
            page.fields["stride"] = gr.Number(
                _FIRST.stride,
                label="Stride",
                info="tokens per step",
                step=1,
                min_width=80,
                elem_id="set-stride",
            )
