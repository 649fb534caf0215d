"""Adapters: which LoRA adapters every variant also runs with, and what each of them is.

Columns are variants × what is ticked here, grouped by variant; single columns can be switched off. What comes back
from the browser is judged by `Form`, never trusted.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator import words
from comparator.adapters import AdapterFacts, builtin_names, describe, open_adapter
from comparator.limits import Limits
from comparator.notation import parse_adapter
from comparator.training import jobs
from comparator.types import Problem
from comparator.ui.markup import code, esc
from comparator.ui.page import PRIVATE, Page, Ticks
from comparator.ui.state import NO_ADAPTER, Form


def build(page: Page) -> None:
    gr.HTML('<h2 class="section">Adapters</h2>', apply_default_css=False)
    chosen = Ticks(
        all_here(),
        value=[NO_ADAPTER],
        label="Every variant runs with",
        show_label=False,
        container=False,
        elem_id="adapters",
    )
    page.fields["adapters"] = chosen
    facts = gr.HTML("", elem_id="adapter-facts", apply_default_css=False)
    with gr.Accordion("Add an adapter", open=False, elem_classes="fold", elem_id="add-adapter"):
        source = gr.Textbox(
            "",
            label="Source",
            info="a Hub repo (user/name@revision) or a folder; *0.5 sets its strength, :merged puts it into the weights",
            placeholder="user/name*0.5",
            max_lines=1,
            lines=1,
            elem_id="adapter-source",
        )
        verdict = gr.HTML("", elem_id="adapter-verdict", apply_default_css=False)
        add = gr.Button("Add adapter", size="sm", elem_id="adapter-add")
    listed = page.adapter_names = gr.State(all_here())
    columns = Ticks(
        [], value=[], label="Columns", info="untick one to leave it out", visible=False, elem_id="columns"
    )
    page.fields["columns"] = columns
    # In the browser, not in a gr.State: that one would already hold the new list while the boxes on their way to a
    # busy browser are still the old ones, and what they lack would pass for switched off.
    known = gr.JSON([], visible=False, elem_id="known-columns")
    page.fields["known_columns"] = known
    # What was switched off by hand: the boxes themselves may lag behind the list while it changes.
    off = page.columns_off = gr.State([])

    def put(names: list[str], on: list[str], text: str, model: Any):
        try:
            adapter = parse_adapter(text or "")
            page.desk.limits.check_source(adapter.source, "adapter")
            found = describe(open_adapter(adapter, settings=page.settings))
            if adapter.notation in names:
                raise Problem(f"{adapter.notation} is in the list already.", "Tick it there.")
            names, on = [*names, adapter.notation], [*on, adapter.notation]
            said = (
                f'<p class="verdict-line" role="status">Added: {code(adapter.notation)} {esc(found.kind)}</p>'
            )
            return names, gr.CheckboxGroup(choices=names, value=on), said
        except Problem as problem:
            return gr.skip(), gr.skip(), refused(problem)

    gr.on(
        [add.click, source.submit],
        put,
        inputs=[listed, chosen, source, page.fields["model"]],
        outputs=[listed, chosen, verdict],
        **PRIVATE,
    )

    def tell(on: list[str], model: Any) -> str:
        ticked = [name for name in on if name != NO_ADAPTER]
        limits = page.desk.limits
        return "".join(described(name, str(model or ""), page.settings, limits) for name in ticked)

    chosen.change(
        tell, inputs=[chosen, page.fields["model"]], outputs=[facts], trigger_mode="always_last", **PRIVATE
    )

    columns.input(
        lambda labels, ticked: [label for label in labels if label not in ticked],
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


def all_here() -> list[str]:
    """“none”, the built-in adapters and those that were trained here, where anybody may train."""
    trainings = jobs.get_trainings()
    trained = [] if trainings.refusal() else [r.adapter for r in trainings.finished()]
    return [NO_ADAPTER, *builtin_names(), *trained]


def grid(picked: Any, on: list[str], off: list[str]):
    """The columns to choose from: all of them, without those that are switched off."""
    try:
        labels = [c.label for c in Form(picked=picked, adapters=on).cells()]
    except Problem:
        labels = []
    useful = any(name != NO_ADAPTER for name in on) and len(labels) > 1
    value = [label for label in labels if label not in off]
    return gr.CheckboxGroup(choices=labels, value=value, visible=useful), labels


def described(notation: str, model: str, settings: Any, limits: Limits | None = None) -> str:
    """What an adapter is, before it runs, as HTML; or why it cannot."""
    try:
        adapter = parse_adapter(notation)
        if limits is not None:
            limits.check_source(adapter.source, "adapter")
        facts = describe(open_adapter(adapter, settings=settings))
    except Problem as problem:
        return refused(problem)
    parts = [
        facts.kind + (f", rank {facts.rank_text}" if facts.ranks else ""),
        f"alpha {facts.alpha:g}" if facts.alpha is not None else "",
        f"scaling {facts.scaling:g}" if facts.scaling is not None else "",
        f"on {', '.join(facts.targets)}" if facts.targets else "",
        _trained(facts, model),
        words.megabytes(facts.bytes),
        f"trained on {facts.base_model}" if facts.base_model else "",
    ]
    return f'<p class="facts">{code(notation)} {esc(" · ".join(p for p in parts if p))}</p>'


def _trained(facts: AdapterFacts, model: str) -> str:
    from comparator.engine import get_engine

    text = f"{words.parameters(facts.parameters)} trained"
    try:
        share = facts.share(get_engine().facts(model).parameters) if model else None
    except Problem:
        share = None
    return text + (f" ({share:.2%} of base and adapter)" if share else "")


def refused(problem: Problem) -> str:
    return (
        f'<p class="verdict-line bad" role="status"><b>{esc(problem.problem)}</b> {esc(problem.advice)}</p>'
    )
