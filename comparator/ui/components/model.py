"""Which model: the built-in one, a Hub repo found as you type, or a local folder; and what is known of it."""

from __future__ import annotations

import gradio as gr

from comparator import words
from comparator.limits import Limits
from comparator.types import ModelFacts, Problem
from comparator.ui.markup import esc
from comparator.ui.page import PRIVATE, Page


def build(page: Page) -> None:
    gr.HTML('<h2 class="section">Model</h2>', apply_default_css=False)
    model = gr.Dropdown(
        _known(page),
        value=page.settings.model,
        allow_custom_value=True,
        label="Model",
        show_label=False,
        elem_id="model",
        info=None,
    )
    page.fields["model"] = model
    facts = gr.HTML(_facts_line(""), elem_id="facts", apply_default_css=False)

    def search(evt: gr.KeyUpData):
        return gr.Dropdown(choices=_matching(page, evt.input_value or ""))

    model.key_up(search, outputs=[model], trigger_mode="always_last", **PRIVATE)

    def describe_it(name: str | None) -> str:
        return describe(name, page.desk.limits)

    page.describe = describe_it
    page.facts = facts


def _known(page: Page) -> list[str]:
    from comparator.sources import builtin_names

    return list(dict.fromkeys([page.settings.model, *builtin_names()]))


def _matching(page: Page, typed: str) -> list[str]:
    """The built-in names, then those on the Hub that fit what is being typed (none when it cannot be reached)."""
    from comparator.sources import search_hub

    names, typed = _known(page), typed.strip()
    if len(typed) >= 3 and not typed.startswith(("/", ".", "~")):
        names += [name for name in search_hub(typed) if name not in names]
    return names


def describe(model: str | None, limits: Limits | None = None) -> str:
    """What is known before anything is loaded, or why nothing is. With limits, what they refuse is not looked at."""
    name = (model or "").strip()
    if not name:
        return _facts_line("Pick a model, or type a Hub name such as user/model.")
    from comparator.engine import get_engine

    try:
        if limits is not None:
            limits.check_source(name)
        facts = get_engine().facts(name)
        if limits is not None:
            limits.check_size(facts)
        return render(facts)
    except Problem as problem:
        return f'<p class="facts bad" role="alert"><b>{esc(problem.problem)}</b> {esc(problem.advice)}</p>'


def render(facts: ModelFacts) -> str:
    parts = [
        f"{words.parameters(facts.parameters)} parameters" if facts.parameters else "",
        (facts.architecture or "").removesuffix("ForCausalLM"),
        facts.dtype or "",
        f"context {facts.context_length:,}" if facts.context_length else "",
        "" if facts.has_chat_template else "no chat template",
    ]
    note = f'<span class="model-note">{esc(facts.note)}</span>' if facts.note else ""
    return _facts_line(" · ".join(p for p in parts if p), note)


def _facts_line(text: str, note: str = "") -> str:
    return f'<p class="facts">{esc(text)}{note}</p>'
