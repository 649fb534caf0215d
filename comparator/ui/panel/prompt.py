"""The prompt, its examples, Run and Stop. Enter runs; Shift+Enter adds a line."""

from __future__ import annotations

import json

import gradio as gr

from comparator.ui.page import Page, html

EXAMPLES = {
    "Blue sky": "Explain in two sentences why the sky is blue.",
    "Capital": "What is the capital of France?",
    "Haiku": "Write a haiku about rain on a tin roof.",
    "Arithmetic": "A train leaves at 14:35 and arrives at 17:10. How long is the journey? Think step by step.",
    "Code": "Write a Python function that returns the n-th Fibonacci number.",
}


def build(page: Page) -> None:
    first = next(iter(EXAMPLES.values()))
    prompt = gr.Textbox(
        first,
        label="Prompt",
        placeholder="Ask something …",
        lines=1,  # with one line Gradio submits on Enter; the style sheet makes the box taller
        max_lines=12,
        elem_id="prompt",
    )
    page.fields["prompt"] = prompt
    with gr.Row(elem_id="examples"):
        for name, text in EXAMPLES.items():
            chip = gr.Button(name, size="sm", elem_classes="chip")
            # In the browser only; no request to the server.
            chip.click(None, outputs=[prompt], js=f"() => {json.dumps(text)}", api_visibility="private")
    with gr.Row(elem_id="actions"):
        page.run = gr.Button("Run", variant="primary", elem_id="run", scale=0)
        page.stop = gr.Button("Stop", elem_id="stop", interactive=False, scale=0)
        page.estimate = html(elem_id="estimate")
        html(
            '<p class="keys"><kbd>Enter</kbd> run · <kbd>Shift</kbd>+<kbd>Enter</kbd> new line</p>',
            elem_id="keys",
        )
        marks = gr.Checkbox(False, label="Highlight differences", elem_id="marks", container=False, scale=0)
        marks.change(
            None, inputs=[marks], js="(on) => { document.body.classList.toggle('show-diff', on) }",
            api_visibility="private",
        )  # fmt: skip
