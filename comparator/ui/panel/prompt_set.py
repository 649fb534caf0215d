"""A set in place of one prompt: a shipped one, a file, or text that is edited here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from comparator.comparison.prompts import checks, reader
from comparator.comparison.tasks import catalog
from comparator.core.errors import UserError
from comparator.ui.form import ONE_PROMPT, OWN_SET, TASK, Form
from comparator.ui.markup import esc
from comparator.ui.page import PRIVATE, Choice, Page, html
from comparator.util import formatting

HOW = (
    'One prompt per line; or JSON objects, one per line: {"prompt": "What is 2 + 2?", "check": "number", "expected": 4}. '
    f"Checks: {', '.join(sorted(checks.CHECKS))}."
)


def build(page: Page) -> None:
    choices = [("the prompt above", ONE_PROMPT), *((f"the set “{n}”", n) for n in reader.shipped()),
               ("your own set", OWN_SET)]  # fmt: skip
    if not page.settings.public:
        choices.append(("a task of lm-evaluation-harness", TASK))
    with gr.Column(elem_id="many-prompts"):
        with gr.Row(elem_id="prompt-set-row"):
            chosen = Choice(
                choices,
                value=ONE_PROMPT,
                label="Prompts",
                show_label=False,
                filterable=False,
                min_width=240,
                elem_id="prompt-set",
            )
            edit = gr.Button("Edit as text", size="sm", scale=0, visible=False, elem_id="prompt-set-edit")
            upload = gr.UploadButton(
                "Load a set …",
                file_types=[".jsonl", ".json", ".csv", ".txt"],
                size="sm",
                scale=0,
                elem_id="prompt-set-file",
            )
            about = html(describe(ONE_PROMPT, ""), elem_id="prompt-set-about")
        with gr.Column(visible=False) as editor:
            text = gr.Textbox(
                "",
                label="Your set",
                info=HOW,
                lines=6,
                max_lines=20,
                elem_id="prompt-set-text",
                max_length=reader.MAX_BYTES,
            )
        with gr.Row(visible=False, elem_id="task-row") as tasks:
            task = gr.Textbox(
                "",
                label="Task",
                info="A name such as arc_easy, or a folder with a task's YAML; separate several with commas.",
                max_lines=1,
                scale=3,
                elem_id="task-name",
            )
            limit = gr.Number(
                100,
                label="Documents",
                info="of each task; 0: all",
                precision=0,
                minimum=0,
                scale=1,
                elem_id="task-limit",
            )
    page.fields["prompt_set"], page.fields["set_text"] = chosen, text
    page.fields["task"], page.fields["limit"] = task, limit
    shown: list[Any] = [about, editor, edit, tasks]

    def show(name: str, written: str):
        own = name == OWN_SET
        return (
            describe(name, written), gr.Column(visible=own), gr.Button(visible=name in reader.shipped()),
            gr.Row(visible=name == TASK),
        )  # fmt: skip

    def copy(name: str):
        return OWN_SET, reader.shipped()[name].read_text(
            encoding="utf-8"
        ) if name in reader.shipped() else gr.skip()

    gr.on(
        [chosen.change, text.change],
        show,
        inputs=[chosen, text],
        outputs=shown,
        trigger_mode="always_last",
        **PRIVATE,
    )
    edit.click(copy, inputs=[chosen], outputs=[chosen, text], **PRIVATE)
    upload.upload(read, inputs=[upload], outputs=[chosen, text], **PRIVATE)


def describe(name: str, text: str) -> str:
    """What Run will do, or what is wrong with the set, as HTML."""
    if name == ONE_PROMPT:
        return '<p class="facts">A set shows how often answers become wrong: every variant answers each prompt.</p>'
    if name == TASK:
        if not catalog.is_installed():
            return f'<p class="facts bad" role="alert">{esc(catalog.MISSING)} <code>{esc(catalog.INSTALL)}</code></p>'
        return (
            '<p class="facts">Every variant answers the documents, and the harness scores the answers. The prompt above is used '
            "for the latencies.</p>"
        )
    try:
        prompts = Form(prompt_set=name, set_text=text).prompts()
    except UserError as problem:
        return f'<p class="facts bad" role="alert"><b>{esc(problem.problem)}</b> {esc(problem.advice)}</p>'
    assert prompts is not None
    kinds = list(dict.fromkeys(p.kind for p in prompts.prompts if p.kind))
    parts = [
        formatting.plural(len(prompts.prompts), "prompt"),
        f"{sum(p.check is not None for p in prompts.prompts):,} with a check",
        ", ".join(kinds[:12]),
    ]
    return f'<p class="facts">{esc(" · ".join(filter(None, parts)))}. The prompt above is not used.</p>'


def read(path: str | None):
    """A file → the fields: JSONL as it is, others converted where they are no plain lines."""
    if not path:
        return gr.skip(), gr.skip()
    try:
        prompts = reader.load(Path(path))
        return OWN_SET, reader.dumps(prompts)
    except UserError as problem:
        gr.Warning(f"{problem.problem} {problem.advice}")
        return gr.skip(), gr.skip()
    finally:
        Path(path).unlink(missing_ok=True)
