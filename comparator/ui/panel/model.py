"""Which model: the built-in one, a Hub repo (searched as you type), or a local folder; and facts about it."""

from __future__ import annotations

from urllib.parse import urlencode

import gradio as gr

from comparator.backends import own_variant
from comparator.core.errors import UserError
from comparator.core.state import ModelFacts
from comparator.deploy.limits import Limits
from comparator.sources.hub_login import logged_in
from comparator.ui.gradio_compat import visitors_login
from comparator.ui.markup import esc
from comparator.ui.page import PRIVATE, Page, html
from comparator.util import formatting

LINKED = "From the link: it is looked up when you press Run."


def build(page: Page) -> None:
    html('<h2 class="section">Model</h2>')
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
    page.linked = gr.State(())
    facts = html(_facts_line(""), elem_id="facts")
    page.examined = html(elem_id="examined")

    def search(evt: gr.KeyUpData):
        return gr.Dropdown(choices=_matching(page, evt.input_value or ""))

    model.key_up(search, outputs=[model], trigger_mode="always_last", **PRIVATE)

    def describe_it(request: gr.Request, name: str | None, linked: tuple[str, ...] = ()) -> str:
        with logged_in(visitors_login(request)):
            return _facts_line(LINKED) if name in linked else describe(name, page.admission.limits)

    page.describe = describe_it
    page.facts = facts


def _known(page: Page) -> list[str]:
    from comparator.sources import builtin_names

    return list(dict.fromkeys([page.settings.model, *builtin_names()]))


def _matching(page: Page, typed: str) -> list[str]:
    """The built-in names, then matching names on the Hub (none if it cannot be reached)."""
    from comparator.sources import search_hub

    names, typed = _known(page), typed.strip()
    if len(typed) >= 3 and not typed.startswith(("/", ".", "~")):
        names += [name for name in search_hub(typed) if name not in names]
    return names


def describe(model: str | None, limits: Limits | None = None) -> str:
    """Facts that are known before anything is loaded, or the error. `limits` are checked before the lookup."""
    name = (model or "").strip()
    if not name:
        return _facts_line("Select a model, or type a Hub name such as user/model.")
    from comparator.engines import get_engine

    try:
        if limits is not None:
            limits.check_source(name)
        facts = get_engine().facts(name)
        if limits is not None:
            limits.check_size(facts)
        return render(facts)
    except UserError as problem:
        return f'<p class="facts bad" role="alert"><b>{esc(problem.problem)}</b> {esc(problem.advice)}</p>'


def examined(model: str | None, linked: tuple[str, ...] = ()) -> str:
    """A line about the model's files, once the engine has looked at them; "" where `describe` has told what is wrong."""
    from comparator.engines import get_engine

    try:
        line = get_engine().examined((model or "").strip()) if model and model not in linked else None
    except UserError:
        line = None
    bad = "" if not line or line.startswith("examined: complete") else " bad"
    return f'<p class="facts{bad}">{esc(line)}</p>' if line else ""


def known_facts(model: str | None, linked: tuple[str, ...], limits: Limits) -> ModelFacts | None:
    """What is known of a model before it is loaded; None where `describe` has told what is wrong, and for a linked one."""
    from comparator.engines import get_engine

    name = (model or "").strip()
    if not name or name in linked:
        return None
    try:
        limits.check_source(name)
        return get_engine().facts(name)
    except UserError:
        return None


def loaded_sizes(model: str | None) -> dict[str, int]:
    """`Engine.sizes` of a model of which `known_facts` knows something."""
    from comparator.engines import get_engine

    try:
        return get_engine().sizes((model or "").strip())
    except UserError:
        return {}


def render(facts: ModelFacts) -> str:
    parts = [
        f"{formatting.parameters(facts.parameters)} parameters" if facts.parameters else "",
        (facts.architecture or "").removesuffix("ForCausalLM"),
        facts.dtype or "",
        f"context {facts.context_length:,}" if facts.context_length else "",
        "" if facts.has_chat_template else "no chat template",
    ]
    notes = filter(None, (esc(facts.note) if facts.note else "", _quantized(facts)))
    return _facts_line(
        " · ".join(p for p in parts if p), "".join(f'<span class="model-note">{n}</span>' for n in notes)
    )


def _quantized(facts: ModelFacts) -> str:
    """HTML: that the model is quantized itself, and a link that compares it with what it was made from."""
    if facts.quantization is None:
        return ""
    own = own_variant(facts)
    if own is None:
        return esc("Quantized with a method that no variant here loads.")
    text = esc(f"Already quantized: it runs as the one variant {own.notation}.")
    if not facts.base_model:
        return f"{text} Choose the model that it was made from to compare it with other variants."
    query = urlencode([("model", facts.base_model), ("v", "bf16"), ("v", own.notation)])
    return (
        f'{text} <a href="?{esc(query)}">Compare it with {esc(facts.base_model)}</a>, which it was made from.'
    )


def _facts_line(text: str, note: str = "") -> str:
    return f'<p class="facts">{esc(text)}{note}</p>'
