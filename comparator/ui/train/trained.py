"""The Train tab, after a run: the adapters trained here, and what can be done with one.

Compare now, evaluate, download as a zip, push to the Hub, delete. A new adapter is also listed in the left panel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from comparator.core.errors import UserError
from comparator.training.types import TrainingResult
from comparator.ui.form import NO_ADAPTER
from comparator.ui.markup import note
from comparator.ui.page import PRIVATE, Choice, Page, html
from comparator.ui.panel import adapters, variants
from comparator.ui.results import notice
from comparator.ui.results.notice import problem, say
from comparator.ui.train import evaluation, publish, trained_view
from comparator.ui.train.evaluation import EvaluationPanel, listed_variants
from comparator.util import formatting

OUTPUTS = 9  # number of values of `TrainedPanel.outputs`
RUN = "() => setTimeout(() => qc.compareNow(), 150)"  # once the line above has been drawn
CONFIRM = "(name, ...rest) => [name && confirm(`Delete the adapter ${name}? Its files are removed.`) ? name : '', ...rest]"


@dataclass
class TrainedPanel:
    """The list of trained adapters, what is known of the chosen one, and its evaluation."""

    empty: gr.HTML  # shown while nothing is trained
    content: gr.Column
    chosen: gr.components.Component
    about: gr.HTML
    evaluation: EvaluationPanel

    def inputs(self, page: Page) -> list[gr.components.Component]:
        return [page.adapter_names, page.fields["adapters"], self.chosen, page.fields["picked"], page.owner]

    def outputs(self, page: Page) -> list[gr.components.Component]:
        """What changes when an adapter is added or deleted; the list of adapters last."""
        own = [self.empty, self.content, self.chosen, self.about, *self.evaluation.outputs()]
        return [*own, page.adapter_names, page.fields["adapters"]]


def build(page: Page) -> TrainedPanel:
    html("<h3>Trained adapters</h3>")
    empty = html(note(trained_view.EMPTY))
    with gr.Column(visible=False, elem_id="trained") as content:
        chosen = Choice([], label="Adapter", filterable=False, elem_id="trained-name")
        about = html(elem_id="trained-about")
        with gr.Row(elem_classes="train-actions"):
            compare = gr.Button("Compare now", variant="primary", elem_id="trained-compare", scale=0)
            download = gr.Button("Download as zip", elem_id="trained-zip", scale=0)
            delete = gr.Button("Delete", elem_id="trained-delete", scale=0)
            status = html(say(""), elem_id="trained-said")
        evaluating = evaluation.build()
        publish.build_push(page, chosen)
    publish.build_zip(page, chosen, download, status)
    panel = TrainedPanel(empty, content, chosen, about, evaluating)

    def show(name: str, picked: Any, before: Any, owner: str):
        mine = page.admission.trainings(owner)
        return *shown(mine, name, picked), *evaluation.boxes_of(mine, name, picked, before)

    def remove(name: str, *inputs: Any):
        return removed(page, name, inputs)

    def compare_now(name: str, picked: Any, listed: list[str], owner: str, request: gr.Request):
        return filled(page, name, picked, listed, owner, getattr(request, "session_hash", None))

    picked = page.fields["picked"]
    gr.on(
        [chosen.change, picked.change],
        show,
        inputs=[chosen, picked, evaluating.boxes, page.owner],
        outputs=[about, *evaluating.outputs(), evaluating.variants, evaluating.boxes],
        trigger_mode="always_last",
        **PRIVATE,
    )
    compare.click(
        compare_now, inputs=[chosen, picked, page.adapter_names, page.owner], outputs=_form(page), **PRIVATE
    ).then(None, js=RUN, api_visibility="private")
    delete.click(
        remove,
        inputs=[chosen, *panel.inputs(page)],
        outputs=[status, *panel.outputs(page)],
        js=CONFIRM,
        **PRIVATE,
    )
    evaluation.wire(page, evaluating, chosen)
    return panel


# ---------------------------------------------------------------- the list


def values(page: Page, inputs: tuple[Any, ...], name: str = "") -> list[Any]:
    """The values of `TrainedPanel.outputs`; `inputs` are those of `TrainedPanel.inputs`.

    Selects the adapter `name` if it exists, else the one selected before; check boxes stay checked.
    """
    listed, ticked, before, picked, owner = inputs
    mine = page.admission.trainings(owner)
    results = mine.finished()
    names = [r.name for r in results]
    chosen = next((n for n in (name, before, *names) if n in names), None)
    now = adapters.all_here(mine)
    listed = [*(a for a in listed if a in now or not _ours(a)), *(a for a in now if a not in listed)]
    boxes = gr.CheckboxGroup(choices=listed, value=[a for a in ticked if a in listed] or [NO_ADAPTER])
    about, measured, pictures, bars = shown(mine, chosen, picked)
    dropdown = gr.Dropdown(choices=trained_view.choices(results), value=chosen)
    some = [gr.HTML(visible=not results), gr.Column(visible=bool(results))]
    return [*some, dropdown, about, measured, pictures, bars, listed, boxes]


def _ours(notation: str) -> bool:
    """Whether it looks like the name of an adapter trained here: deleted ones are removed from the list."""
    return not any(mark in notation for mark in "/\\.~@*:")


def shown(mine: Any, name: str | None, picked: Any = None) -> list[Any]:
    """(description, table of the evaluation, row of the plot, plot). `mine`: the visitor's trainings."""
    if not name:
        return ["", "", gr.Row(visible=False), gr.skip()]
    try:
        result = mine.result(name)
    except UserError as error:
        return [problem(error), "", gr.Row(visible=False), gr.skip()]
    return [trained_view.described(result), *evaluation.pictured(result.evaluation, picked)]


# ---------------------------------------------------------------- what the buttons do


def _form(page: Page) -> list[gr.components.Component]:
    names = ("model", "picked", "adapters", "columns", "known_columns")
    return [page.notice, *(page.fields[n] for n in names), page.adapter_names, page.columns_off]


def filled(
    page: Page, name: str, picked: Any, listed: list[str], owner: Any, session: str | None
) -> list[Any]:
    """Fill in the form for variants × {none, this adapter}: the selected variants and the adapter's base."""
    try:
        if page.runs.going(session):
            raise UserError(
                "A comparison is running on this page.", "Press Stop above first, then Compare now."
            )
        result = page.admission.trainings(owner).result(name or "")
        picked, left_out = _with_base(picked, result, page.settings.max_columns)
    except UserError as error:
        return [notice.problem(error), *[gr.skip()] * 7]
    names = list(dict.fromkeys([*listed, result.adapter]))
    on = [NO_ADAPTER, result.adapter]
    boxes, labels = adapters.grid(picked, on, [])
    cut = f" {formatting.join(left_out)} omitted: too many columns." if left_out else ""
    line = notice.say(f"{result.name}: every variant without and with the adapter.{cut}")
    return [line, result.model, picked, gr.CheckboxGroup(choices=names, value=on), boxes, labels, names, []]


def _with_base(picked: Any, result: TrainingResult, most: int) -> tuple[dict[str, Any], list[str]]:
    """(the list with the base selected too, variants deselected because two columns each exceed the limit)."""
    value = picked if isinstance(picked, dict) else variants.picked(most)
    _, on = listed_variants(value)
    if result.base not in on:
        value = variants.with_added(value, result.base, most)
        on = value["on"]
    room = max(1, most // 2)
    fitting = [result.base, *(n for n in on if n != result.base)][:room]
    return {**value, "on": [n for n in on if n in fitting]}, [n for n in on if n not in fitting]


def removed(page: Page, name: str, inputs: tuple[Any, ...]) -> list[Any]:
    nothing = [gr.skip()] * OUTPUTS
    if not name:
        return [say(""), *nothing]  # not confirmed
    try:
        page.admission.trainings(inputs[-1]).remove(name)
    except UserError as error:
        return [problem(error), *nothing]
    return [say(f"Deleted {name}."), *values(page, inputs)]
