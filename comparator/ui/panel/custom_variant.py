"""A form for a custom variant, built from the options that the backends declare.

The form writes the notation, which can also be edited. Both are checked while typing: the line below describes the
variant, or says what is wrong with it and what to write instead.

All methods share the same input components, which get another label, help and choices when another method is selected:
a set for each method would be a fifth of the page's components, and the browser goes through all of them at each opening.
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
EMPTY = object()  # in place of an option: a slot that the method has no use for
_COMPONENTS = {"text": gr.Textbox, "choice": gr.Dropdown, "number": gr.Number, "flag": gr.Checkbox}


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
        slots = _slots([m for _, m in known.values()])
        with gr.Column(elem_classes="options"):
            inputs = _inputs(slots, *known[FIRST])
        notation = gr.Textbox(FIRST, label="Notation", elem_id="custom-notation", max_lines=1, lines=1)
        verdict = html(described(FIRST), elem_id="custom-verdict")
        add = gr.Button("Add variant", size="sm", elem_id="custom-add")

    def write(chosen: str, *values: Any) -> tuple[str, str]:
        placed = _placed(slots, known[chosen][1])
        text = compose(*known[chosen], {o: v for o, v in zip(placed, values, strict=True) if o is not EMPTY})
        return text, described(text)

    def switch(chosen: str):
        text = compose(*known[chosen], {})
        return *_inputs(slots, *known[chosen]), text, described(text)

    def put(picked: Any, text: str):
        try:
            return with_added(picked, text, page.settings.max_columns), described(text, added=True)
        except UserError as problem:
            return gr.skip(), _refused(problem)

    # .input, not .change: only what a person changes, so that the form never triggers itself
    method.input(switch, inputs=[method], outputs=[*inputs, notation, verdict], **PRIVATE)
    # Gradio's text boxes tell of keys only; what was pasted with the mouse is read when the field is left.
    left = [field.blur for field in inputs if isinstance(field, gr.Textbox)]
    gr.on(
        [*(field.input for field in inputs), *left], write,
        inputs=[method, *inputs], outputs=[notation, verdict], trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    notation.change(described, inputs=[notation], outputs=[verdict], trigger_mode="always_last", **PRIVATE)
    gr.on(
        [add.click, notation.submit],
        put,
        inputs=[page.fields["picked"], notation],
        outputs=[page.fields["picked"], verdict],
        **PRIVATE,
    )


def _slots(known: list[Method]) -> dict[str, int]:
    """How many input components of each kind the method with the most of them needs."""
    return {kind: max(len(_by_kind(m)[kind]) for m in known) for kind in _COMPONENTS}


def _by_kind(method: Method) -> dict[str, list[Option | None]]:
    """The method's options (None: its source) by kind of input component."""
    fields: dict[str, list[Option | None]] = {kind: [] for kind in _COMPONENTS}
    if method.takes_source:
        fields["text"].append(None)
    for option in method.options:
        kind = (
            option.kind if option.kind in fields and (option.kind != "choice" or option.choices) else "text"
        )
        fields[kind].append(option)
    return fields


def _placed(slots: dict[str, int], method: Method) -> list[Any]:
    """The option in each slot (None: the source), `EMPTY` where the method has no use for it."""
    fields = _by_kind(method)
    return [o for kind, count in slots.items() for o in fields[kind] + [EMPTY] * (count - len(fields[kind]))]


def _inputs(slots: dict[str, int], backend: Backend, method: Method) -> list[gr.components.Component]:
    """A component in each slot, as it is for this method."""
    kinds = [kind for kind, count in slots.items() for _ in range(count)]
    made = []
    for kind, option in zip(kinds, _placed(slots, method), strict=True):
        if option is EMPTY:
            made.append(_COMPONENTS[kind](visible=False))
        elif option is None:
            made.append(gr.Textbox("", label="Source", info=_about_source(backend, method), visible=True))
        else:
            made.append(_field(option))
    return made


def _about_source(backend: Backend, method: Method) -> str:
    if backend.source_kind == "endpoint":
        return "a name from COMPARATOR_ENDPOINTS, or an address such as http://host:8000/v1"
    return "a Hub repo or a folder" + ("" if method.needs_source else "; leave empty to quantize here")


def _field(option: Option) -> gr.components.Component:
    """The input component for an option."""
    common = {"label": option.name, "info": option.help, "visible": True}
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
