"""Generation settings: the two most used ones, and the others in a fold."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr

from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings
from comparator.ui.page import PRIVATE, Page, html

_FIRST = GenerationSettings()


def build(page: Page) -> None:
    html('<h2 class="section">Settings</h2>')
    limit = page.settings.max_new_tokens
    with gr.Row(elem_classes="pair"):
        _number(
            page,
            "max_new_tokens",
            "New tokens",
            min(_FIRST.max_new_tokens, limit),
            whole=True,
            info=f"1 to {limit:,}",
        )
        _number(page, "temperature", "Temperature", _FIRST.temperature, step=0.1, info="0 is greedy")
    with gr.Accordion("More settings", open=False, elem_classes="fold"):
        with gr.Row(elem_classes="pair"):
            _number(page, "top_p", "Top-p", _FIRST.top_p, step=0.05, info="1 is off")
            _number(page, "top_k", "Top-k", _FIRST.top_k, whole=True, info="0 is off")
        with gr.Row(elem_classes="pair"):
            _number(
                page,
                "repetition_penalty",
                "Repetition penalty",
                _FIRST.repetition_penalty,
                step=0.05,
                info="1 is off",
            )
            _number(page, "seed", "Seed", _FIRST.seed, whole=True, info="the same noise for every variant")
        _number(
            page, "repeats", "Repeats", _FIRST.repeats, whole=True,
            info="Interleaved runs per variant; 0: 3 where a round takes under 10 s, else 1. Speeds are compared from 3 on.",
        )  # fmt: skip
        page.fields["system"] = gr.Textbox(
            "", label="System prompt", lines=2, max_lines=6, placeholder="none"
        )
        page.fields["chat"] = gr.Radio(
            [("if the model has one", "auto"), ("always", "on"), ("never", "off")],
            value="auto",
            label="Chat template",
        )
        page.fields["template_vars"] = gr.Textbox(
            "",
            label="Template variables",
            info="One NAME=VALUE per line, for example enable_thinking=false.",
            lines=1,
            max_lines=6,
            placeholder="none",
            elem_id="set-template-vars",
        )
        page.fields["template"] = gr.Textbox(
            "",
            label="Named chat template",
            placeholder="the model's default",
            max_lines=1,
            elem_id="set-template",
        )
        page.fields["decode"] = gr.Radio(
            [
                ("fastest", "auto"),
                ("fastest and eager", "both"),
                ("eager (plain transformers)", "eager"),
            ],
            value="auto",
            label="Decoding",
            info="On a GPU, fastest means CUDA graphs. Adding eager shows the Python overhead per token.",
        )
        page.fields["max_memory"] = gr.Textbox(
            "",
            label="Memory limits",
            info="Splits a model across devices; the Layers tab shows where each layer is.",
            placeholder="none; for example 0=6GiB,cpu=20GiB",
            max_lines=1,
            elem_id="set-max-memory",
        )
        page.fields["calibration"] = gr.Textbox(
            "",
            label="Calibration text",
            info="Paste a few pages, with blank lines between the texts, or enter c4 or wikitext2.",
            lines=2,
            max_lines=8,
            placeholder="leave empty for the bundled text",
            elem_id="set-calibration",
        )
        upload = gr.UploadButton("Load calibration text", file_types=["text", ".json", ".jsonl"], size="sm")
        upload.upload(_read, inputs=[upload], outputs=[page.fields["calibration"]], **PRIVATE)


def _read(path: str | None):
    """A calibration file → the field's value: one JSON string per line."""
    from comparator.backends import calibration

    if not path:
        return gr.skip()
    try:
        documents = calibration.read_file(Path(path))
    except UserError as problem:
        gr.Warning(f"{problem.problem} {problem.advice}")
        return gr.skip()
    return "\n".join(json.dumps(text, ensure_ascii=False) for text in documents)


def _number(
    page: Page, name: str, label: str, value: float, *, info: str, whole: bool = False, step: float = 1
) -> None:
    # No minimum or maximum here: Gradio would only say "value is less than minimum"; the request's own check names the
    # field and its range.
    page.fields[name] = gr.Number(
        value,
        label=label,
        info=info,
        step=1 if whole else step,
        min_width=80,
        elem_id=f"set-{name.replace('_', '-')}",
    )
