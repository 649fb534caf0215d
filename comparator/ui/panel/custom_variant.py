"""A form for a custom variant, built from the options that the backends declare.

The form writes the notation, which can also be edited. Both are checked while typing: the line below describes the
variant, or says what is wrong with it and what to write instead.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator.backends import methods, resolve
from comparator.backends.base import Backend, Method, Option
from comparator.core.errors import UserError
from comparator.core.variant import Variant, format_variant, sort_options
from comparator.ui.markup import code, esc
from comparator.ui.page import PRIVATE, Page, html
from comparator.ui.panel.variants import with_added

FIRST = "nf4"


def build(page: Page) -> None:
    known = methods()
    with gr.Accordion("Custom variant", open=False, elem_classes="fold", elem_id="custom"):
        method = gr.Dropdown(
            [(f"{name}: {m.title}", name) for name, (_, m) in known.items()],
            value=FIRST,
            label="Method",
            filterable=False,
            elem_id="custom-method",
        )
        groups, inputs, owners = [], [], []
        for name, (backend, m) in known.items():
            with gr.Column(visible=name == FIRST, elem_classes="options") as group:
                if m.takes_source:
                    inputs.append(gr.Textbox("", label="Source", info=_about_source(backend, m)))
                    owners.append((name, None))
                for option in m.options:
                    inputs.append(_field(option))
                    owners.append((name, option))
            groups.append(group)
        notation = gr.Textbox(FIRST, label="Notation", elem_id="custom-notation", max_lines=1, lines=1)
        verdict = html(described(FIRST), elem_id="custom-verdict")
        add = gr.Button("Add variant", size="sm", elem_id="custom-add")

    def write(chosen: str, *values: Any) -> tuple[str, str]:
        fields = {o: v for (m, o), v in zip(owners, values, strict=True) if m == chosen}
        text = compose(*known[chosen], fields)
        return text, described(text)

    def switch(chosen: str, *values: Any):
        return *(gr.Column(visible=name == chosen) for name in known), *write(chosen, *values)

    def put(picked: Any, text: str):
        try:
            return with_added(picked, text, page.settings.max_columns), described(text, added=True)
        except UserError as problem:
            return gr.skip(), _refused(problem)

    # .input, not .change: only what a person changes, so that the form never triggers itself
    method.input(switch, inputs=[method, *inputs], outputs=[*groups, notation, verdict], **PRIVATE)
    for field in inputs:
        field.input(
            write,
            inputs=[method, *inputs],
            outputs=[notation, verdict],
            trigger_mode="always_last",
            **PRIVATE,
        )
    notation.change(described, inputs=[notation], outputs=[verdict], trigger_mode="always_last", **PRIVATE)
    gr.on(
        [add.click, notation.submit],
        put,
        inputs=[page.fields["picked"], notation],
        outputs=[page.fields["picked"], verdict],
        **PRIVATE,
    )


def _about_source(backend: Backend, method: Method) -> str:
    if backend.source_kind == "endpoint":
        return "a name from COMPARATOR_ENDPOINTS, or an address such as http://host:8000/v1"
    return "a Hub repo or a folder" + ("" if method.needs_source else "; leave empty to quantize here")


def _field(option: Option) -> gr.components.Component:
    """The input component for an option."""
    common = {"label": option.name, "info": option.help}
    if option.kind == "flag":
        return gr.Checkbox(option.default == "true", **common)
    if option.kind == "choice" and option.choices:
        # No default: chosen by model and machine, and left out of the notation.
        open_end = [] if option.default is not None else [("automatic", "")]
        return gr.Dropdown(
            [*open_end, *option.choices], value=option.default or "", filterable=False, **common
        )
    if option.kind == "number":
        return gr.Number(float(option.default) if option.default else None, **common)
    return gr.Textbox(option.default or "", max_lines=1, lines=1, **common)


def compose(backend: Backend, method: Method, fields: dict[Option | None, Any]) -> str:
    """The form's values → notation: canonical if valid, else as entered, so that the error shows it.

    `given` maps each option (None: the source) to its field's value.
    """
    source, options = None, {}
    for option, value in fields.items():
        if option is None:
            source = str(value or "").strip() or None
            continue
        text = _text(option, value)
        if text is None or text == option.default:
            continue
        key, equals, rest = option.form.format(name=option.name, value=text).partition("=")
        options[key] = rest if equals else None
    path, _, revision = (source or "").partition("@")
    variant = Variant(method.name, path or None, revision or None, sort_options(options))
    try:
        return resolve(variant).notation
    except UserError:
        return format_variant(variant)


def _text(option: Option, value: Any) -> str | None:
    """A field's value as written in the notation; None if empty."""
    if value is None:
        return None
    if option.kind == "flag":
        return "true" if value else "false"
    if option.kind == "number":
        try:
            return f"{float(value):g}"
        except ValueError:
            return str(value)  # the notation parser reports the error
    if option.kind == "names":
        return "+".join(str(value).replace(",", " ").replace("+", " ").split()) or None
    return str(value).strip() or None


def described(text: str, added: bool = False) -> str:
    """What the notation means, or why it is invalid, as HTML."""
    try:
        variant = resolve(text or "")
    except UserError as problem:
        return _refused(problem)
    backend, method = methods()[variant.method]
    if missing := backend.unavailable(variant):
        return _refused(UserError(f"{method.name} cannot be used here.", missing))
    lead = "Added: " if added else ""
    return f'<p class="verdict-line" role="status">{lead}{code(variant.notation)} {esc(backend.describe(variant))}</p>'


def _refused(problem: UserError) -> str:
    return (
        f'<p class="verdict-line bad" role="status"><b>{esc(problem.problem)}</b> {esc(problem.advice)}</p>'
    )
