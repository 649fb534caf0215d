"""How to decode: the two settings that everyone changes, and the rest folded away."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr

from comparator.types import GenerationSettings, Problem
from comparator.ui.page import PRIVATE, Page

_FIRST = GenerationSettings()


def build(page: Page) -> None:
    gr.HTML('<h2 class="section">Settings</h2>', apply_default_css=False)
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
            _number(page, "seed", "Seed", _FIRST.seed, whole=True, info="same noise for all")
        _number(
            page, "repeats", "Repeats", _FIRST.repeats, whole=True,
            info="Columns take turns; the median counts, and differences within the spread are “can't tell”.",
        )  # fmt: skip
        page.fields["system"] = gr.Textbox(
            "", label="System prompt", lines=2, max_lines=6, placeholder="none"
        )
        page.fields["chat"] = gr.Radio(
            [("where there is one", "auto"), ("always", "on"), ("never", "off")],
            value="auto",
            label="Chat template",
        )
        page.fields["decode"] = gr.Radio(
            [
                ("fastest", "auto"),
                ("fastest, and eager too", "both"),
                ("eager, as plain transformers", "eager"),
            ],
            value="auto",
            label="Decoding",
            info="On a GPU the fastest is a CUDA graph a token; eager too shows what Python costs each variant.",
        )
        page.fields["max_memory"] = gr.Textbox(
            "",
            label="Memory limits",
            info="Spreads a model over devices: each layer's place is in the Layers table.",
            placeholder="none; for example 0=6GiB,cpu=20GiB",
            max_lines=1,
            elem_id="set-max-memory",
        )
        page.fields["calibration"] = gr.Textbox(
            "",
            label="GPTQ calibration text",
            info="Paste your own, a few pages with blank lines between texts, or write c4 or wikitext2.",
            lines=2,
            max_lines=8,
            placeholder="empty: the text that comes with this project",
            elem_id="set-calibration",
        )
        upload = gr.UploadButton("Calibration from a file", file_types=["text", ".json", ".jsonl"], size="sm")
        upload.upload(_read, inputs=[upload], outputs=[page.fields["calibration"]], **PRIVATE)


def _read(path: str | None):
    """A calibration file → the field: as it is, or for a list of texts one JSON string a line."""
    from comparator.gptq import calibration

    if not path:
        return gr.skip()
    try:
        documents = calibration.read_file(Path(path))
    except Problem as problem:
        gr.Warning(f"{problem.problem} {problem.advice}")
        return gr.skip()
    return "\n".join(json.dumps(text, ensure_ascii=False) for text in documents)


def _number(
    page: Page, name: str, label: str, value: float, *, info: str, whole: bool = False, step: float = 1
) -> None:
    # No minimum or maximum here: Gradio would refuse with a bare "value is less than minimum"; the request's own
    # check says which field, which range, and what to do.
    page.fields[name] = gr.Number(
        value,
        label=label,
        info=info,
        step=1 if whole else step,
        min_width=80,
        elem_id=f"set-{name.replace('_', '-')}",
    )
