"""Adapters: the LoRA adapters that every variant runs with, and what each of them is.

Columns are variants × selected adapters, grouped by variant; single columns can be deselected. `Form` validates what the
browser sends.
"""

from __future__ import annotations

import threading
import time
from typing import Any

import gradio as gr

from comparator.adapters import AdapterFacts, builtin_names, describe, open_adapter
from comparator.core.errors import Stopped, UserError
from comparator.core.variant import Adapter, parse_adapter
from comparator.engines import get_trainings
from comparator.sources.hub_login import logged_in
from comparator.ui.admission import Admission
from comparator.ui.form import NO_ADAPTER, Form
from comparator.ui.gradio_compat import visitors_login
from comparator.ui.markup import code, esc
from comparator.ui.page import PRIVATE, Page, Ticks, html
from comparator.ui.panel.model import LINKED
from comparator.util import formatting

MOST_CHOICES, MOST_CHARACTERS = 256, 1000  # of a list of boxes, and of the name of one
_OPEN_S = 60.0  # for a stranger's adapter in a form; a run waits as long as it takes
_opening = threading.BoundedSemaphore(8)  # each has a thread of the page's while a server sends its file


def build(page: Page) -> None:
    html('<h2 class="section">Adapters</h2>')
    chosen = Ticks(
        all_here(),
        value=[NO_ADAPTER],
        label="Run every variant with",
        show_label=False,
        container=False,
        elem_id="adapters",
    )
    page.fields["adapters"] = chosen
    facts = html(elem_id="adapter-facts")
    with gr.Accordion("Add an adapter", open=False, elem_classes="fold", elem_id="add-adapter"):
        source = gr.Textbox(
            "",
            label="Source",
            info="a Hub repo (user/name@revision) or a folder; *0.5 scales it, :merged merges it into the weights",
            placeholder="user/name*0.5",
            max_lines=1,
            lines=1,
            elem_id="adapter-source",
        )
        verdict = html(elem_id="adapter-verdict")
        add = gr.Button("Add adapter", size="sm", elem_id="adapter-add")
    listed = page.adapter_names = gr.State(all_here())
    columns = Ticks(
        [], value=[], label="Columns", info="deselect one to skip it", visible=False, elem_id="columns"
    )
    page.fields["columns"] = columns
    # In the browser, not in a gr.State: a State would already hold the new list while a busy browser still has the old
    # boxes, and new columns would count as deselected.
    known = gr.JSON([], visible=False, elem_id="known-columns")
    page.fields["known_columns"] = known
    # The columns that the visitor deselected: the boxes themselves may lag behind while the list changes.
    off = page.columns_off = gr.State([])

    def put(request: gr.Request, names: list[str], on: list[str], text: str, model: Any, owner: str):
        try:
            if len(names) >= MOST_CHOICES:
                raise UserError(f"The list has {len(names)} adapters.", "Reload the page to start over.")
            adapter = parse_adapter(text or "")
            with logged_in(visitors_login(request)):
                facts = opened(adapter, page.admission, owner)
            if adapter.notation in names:
                raise UserError(f"{adapter.notation} is already in the list.", "Select it there.")
            names, on = [*names, adapter.notation], [*on, adapter.notation]
            status = (
                f'<p class="verdict-line" role="status">Added: {code(adapter.notation)} {esc(facts.kind)}</p>'
            )
            return names, gr.CheckboxGroup(choices=names, value=on), status
        except UserError as problem:
            return gr.skip(), gr.skip(), refused(problem)

    gr.on(
        [add.click, source.submit],
        put,
        inputs=[listed, chosen, source, page.fields["model"], page.owner],
        outputs=[listed, chosen, verdict],
        **PRIVATE,
    )

    def describe_selected(
        request: gr.Request, on: list[str], model: Any, linked: tuple[str, ...], owner: str = ""
    ) -> str:
        ticked = [name for name in on[:MOST_CHOICES] if name != NO_ADAPTER]
        base, since_s = "" if model in linked else str(model or ""), time.monotonic()
        with logged_in(visitors_login(request)):
            return "".join(
                f'<p class="facts">{code(name)} {LINKED}</p>'
                if name in linked
                else described(name, base, page.admission, owner, since_s)
                for name in ticked
            )

    chosen.change(
        describe_selected,
        inputs=[chosen, page.fields["model"], page.linked, page.owner],
        outputs=[facts],
        trigger_mode="always_last",
        **PRIVATE,
    )

    columns.input(
        deselected,
        inputs=[known, columns],
        outputs=[off],
        trigger_mode="always_last",
        **PRIVATE,
    )
    gr.on(
        [chosen.change, page.fields["picked"].change],
        grid,
        inputs=[page.fields["picked"], chosen, off],
        outputs=[columns, known],
        trigger_mode="always_last",
        **PRIVATE,
    )


def deselected(labels: Any, ticked: list[str]) -> list[str]:
    """The columns that are not ticked. It is kept for as long as the page is open, so no more than a page can list."""
    known = [str(label) for label in labels[:MOST_CHOICES]] if isinstance(labels, list) else []
    return [label for label in known if label not in ticked and len(label) <= MOST_CHARACTERS]


def all_here(trainings: Any = None) -> list[str]:
    """“none”, the built-in adapters, and those trained here unless training is disabled. `trainings`: the visitor's."""
    trainings = trainings or get_trainings().seen_by(None)
    trained = [] if trainings.installation_refusal() else [r.adapter for r in trainings.finished()]
    return [NO_ADAPTER, *builtin_names(), *trained]


def grid(picked: Any, on: list[str], off: list[str]):
    """Check boxes for all columns; those in `off` are not selected."""
    try:
        labels = [c.label for c in Form(picked=picked, adapters=on).cells()]
    except UserError:
        labels = []
    useful = any(name != NO_ADAPTER for name in on) and len(labels) > 1
    value = [label for label in labels if label not in off]
    return gr.CheckboxGroup(choices=labels, value=value, visible=useful), labels


def described(
    notation: str, model: str, admission: Admission, owner: Any = None, since_s: float | None = None
) -> str:
    """Facts about an adapter as HTML, or why it cannot be used."""
    try:
        facts = opened(parse_adapter(notation), admission, owner, since_s)
    except UserError as problem:
        return refused(problem)
    parts = [
        facts.kind + (f", rank {facts.rank_text}" if facts.ranks else ""),
        f"alpha {facts.alpha:g}" if facts.alpha is not None else "",
        f"scaling {facts.scaling:g}" if facts.scaling is not None else "",
        f"on {', '.join(facts.targets)}" if facts.targets else "",
        _trained(facts, model),
        formatting.megabytes(facts.bytes),
        f"trained on {facts.base_model}" if facts.base_model else "",
    ]
    return f'<p class="facts">{code(notation)} {esc(" · ".join(p for p in parts if p))}</p>'


def opened(adapter: Adapter, admission: Admission, owner: Any, since_s: float | None = None) -> AdapterFacts:
    """What the adapter is. Raises `UserError`, on a public server also where it takes long, counted from `since_s`
    (`time.monotonic()`), or many are just being opened."""
    admission.limits.check_adapter(adapter)
    admission.check_owner(adapter.source, owner)
    if not admission.settings.public:
        return describe(open_adapter(adapter, settings=admission.settings))
    end_s = (since_s or time.monotonic()) + _OPEN_S

    def in_time(fraction: float | None, message: str) -> None:
        if time.monotonic() > end_s:
            raise Stopped

    if not _opening.acquire(timeout=0.5):
        raise UserError("Other adapters are just being opened.", "Try again in a few seconds.")
    try:
        return describe(open_adapter(adapter, progress=in_time, settings=admission.settings))
    except Stopped:
        raise UserError(
            f"{adapter.source} was not opened within {_OPEN_S:g} s.",
            "Try again later, or run Quant Comparator on your own machine.",
        ) from None
    finally:
        _opening.release()


def _trained(facts: AdapterFacts, model: str) -> str:
    from comparator.engines import get_engine

    text = f"{formatting.parameters(facts.parameters)} parameters"
    try:
        share = facts.share(get_engine().facts(model).parameters) if model else None
    except UserError:
        share = None
    return text + (f" ({share:.2%} of base and adapter)" if share else "")


def refused(problem: UserError) -> str:
    return (
        f'<p class="verdict-line bad" role="status"><b>{esc(problem.problem)}</b> {esc(problem.advice)}</p>'
    )
