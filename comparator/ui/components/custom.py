"""A form for a variant of one's own, built from what the backends say their options are.

The form writes the notation, the notation can be edited, and either is judged as it is typed: the line below says
what the variant is, or what is wrong with it and what to write instead.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator.backends import methods, resolve
from comparator.backends.base import Backend, Method, Option
from comparator.notation import format_variant, sort_options
from comparator.types import Problem, Variant
from comparator.ui.components.variants import title, with_added
from comparator.ui.markup import code, esc
from comparator.ui.page import PRIVATE, Page

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
        for name, (_, m) in known.items():
            with gr.Column(visible=name == FIRST, elem_classes="options") as group:
                if m.takes_source:
                    inputs.append(
                        gr.Textbox("", label="Source", info="a Hub repo or a folder; empty: quantize here")
                    )
                    owners.append((name, None))
                for option in m.options:
                    inputs.append(_field(option))
                    owners.append((name, option))
            groups.append(group)
        notation = gr.Textbox(FIRST, label="Notation", elem_id="custom-notation", max_lines=1, lines=1)
        verdict = gr.HTML(judge(FIRST), elem_id="custom-verdict", apply_default_css=False)
        add = gr.Button("Add column", size="sm", elem_id="custom-add")

    def write(chosen: str, *values: Any) -> tuple[str, str]:
        given = {o: v for (m, o), v in zip(owners, values, strict=True) if m == chosen}
        text = compose(*known[chosen], given)
        return text, judge(text)

    def switch(chosen: str, *values: Any):
        return *(gr.Column(visible=name == chosen) for name in known), *write(chosen, *values)

    def put(picked: Any, text: str):
        try:
            return with_added(picked, text, page.settings.max_columns), judge(text, added=True)
        except Problem as problem:
            return gr.skip(), _refused(problem)

    # .input, not .change: only what a person chooses or types, so that the form never answers itself
    method.input(switch, inputs=[method, *inputs], outputs=[*groups, notation, verdict], **PRIVATE)
    for field in inputs:
        field.input(
            write,
            inputs=[method, *inputs],
            outputs=[notation, verdict],
            trigger_mode="always_last",
            **PRIVATE,
        )
    notation.change(judge, inputs=[notation], outputs=[verdict], trigger_mode="always_last", **PRIVATE)
    gr.on(
        [add.click, notation.submit],
        put,
        inputs=[page.fields["picked"], notation],
        outputs=[page.fields["picked"], verdict],
        **PRIVATE,
    )


def _field(option: Option) -> gr.components.Component:
    """The input that fits an option's kind."""
    common = {"label": option.name, "info": option.help}
    if option.kind == "flag":
        return gr.Checkbox(option.default == "true", **common)
    if option.kind == "choice" and option.choices:
        # No default: what the model or the machine suggests, and no option in the notation.
        open_end = [] if option.default is not None else [("as it fits", "")]
        return gr.Dropdown(
            [*open_end, *option.choices], value=option.default or "", filterable=False, **common
        )
    if option.kind == "number":
        return gr.Number(float(option.default) if option.default else None, **common)
    return gr.Textbox(option.default or "", max_lines=1, lines=1, **common)


def compose(backend: Backend, method: Method, given: dict[Option | None, Any]) -> str:
    """What the form holds → notation; canonical where it is valid, as written where it is not, so that the refusal
    shows what it is about. `given` maps each option (None: the source) to its field's value."""
    source, options = None, {}
    for option, value in given.items():
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
    except Problem:
        return format_variant(variant)


def _text(option: Option, value: Any) -> str | None:
    """A field's value as the notation writes it; None where there is none."""
    if value is None:
        return None
    if option.kind == "flag":
        return "true" if value else "false"
    if option.kind == "number":
        try:
            return f"{float(value):g}"
        except ValueError:
            return str(value)  # the notation's own check will say what is wrong with it
    if option.kind == "names":
        return "+".join(str(value).replace(",", " ").replace("+", " ").split()) or None
    return str(value).strip() or None


def judge(text: str, added: bool = False) -> str:
    """What the notation means, or what is wrong with it; as HTML."""
    try:
        variant = resolve(text or "")
    except Problem as problem:
        return _refused(problem)
    backend, method = methods()[variant.method]
    if missing := backend.unavailable():
        return _refused(Problem(f"{method.name} cannot be used here.", missing))
    lead = "Added: " if added else ""
    return f'<p class="verdict-line" role="status">{lead}{code(variant.notation)} {esc(title(variant))}</p>'


def _refused(problem: Problem) -> str:
    return (
        f'<p class="verdict-line bad" role="status"><b>{esc(problem.problem)}</b> {esc(problem.advice)}</p>'
    )
