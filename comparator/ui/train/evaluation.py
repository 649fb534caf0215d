"""The Train tab, after a run: loss and perplexity of every variant, with and without the adapter."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import gradio as gr

from comparator.backends import most_precise, resolve
from comparator.core.errors import Stopped, UserError
from comparator.reporting.plots import training
from comparator.reporting.plots.style import colours
from comparator.training.types import EvalRow, Evaluation, TrainingResult
from comparator.ui.markup import note
from comparator.ui.page import DIRECT, PRIVATE, Page, Ticks, html, picture
from comparator.ui.progress import batches
from comparator.ui.results.notice import problem, say
from comparator.ui.train import trained_view
from comparator.util import formatting
from comparator.util.streams import Background

HEADING = "<h4>Evaluate on the held-out samples</h4>" + note(
    "Loss and perplexity on the held-out samples, for each variant, without and with the adapter."
)


@dataclass
class EvaluationPanel:
    """The fields of the evaluation, and where its result appears."""

    variants: gr.components.Component
    start: gr.Button
    stop: gr.Button
    status: gr.HTML
    table: gr.HTML
    plots: gr.Row
    bars: gr.Plot
    boxes: gr.State  # the check boxes as the server set them last

    def outputs(self) -> list[gr.components.Component]:
        """The table, the row of plots and the plot, in the order of `pictured`."""
        return [self.table, self.plots, self.bars]


def build() -> EvaluationPanel:
    html(HEADING)
    variants = Ticks([], label="Variants", elem_id="trained-on")
    with gr.Row(elem_classes="train-actions"):
        start = gr.Button("Evaluate", elem_id="trained-evaluate", scale=0)
        stop = gr.Button("Stop", elem_id="trained-evaluate-stop", interactive=False, scale=0)
        status = html(say(""), elem_id="trained-told")
    with gr.Row(elem_classes="plots one", visible=False) as plots:
        bars = picture("Loss on the held-out samples")
    table = html(elem_id="trained-table")
    return EvaluationPanel(variants, start, stop, status, table, plots, bars, gr.State(None))


def wire(page: Page, panel: EvaluationPanel, adapter: gr.components.Component) -> None:
    """Connect Evaluate and Stop; `adapter` is the field with the name of the trained adapter."""

    async def evaluate(
        request: gr.Request, name: str, on: list[str], picked: Any, owner: str
    ) -> AsyncIterator[list[Any]]:
        async for values in stream(page, name, on, request, picked, owner):
            yield values

    async def halt(request: gr.Request) -> None:
        page.evaluation_runs.stop(request.session_hash)

    panel.start.click(
        evaluate,
        inputs=[adapter, panel.variants, page.fields["picked"], page.owner],
        outputs=[panel.status, panel.start, panel.stop, panel.plots, panel.bars, panel.table],
        trigger_mode="once",
        **PRIVATE,
    )
    panel.stop.click(halt, **DIRECT)


def pictured(evaluation: Evaluation | None, picked: Any) -> list[Any]:
    """(table, row of the plot, plot) of an evaluation."""
    if evaluation is None or not evaluation.rows:
        return ["", gr.Row(visible=False), gr.skip()]
    # The colours of the list on the left, so that a variant has the same colour everywhere.
    listed, on = listed_variants(picked)
    ticked = [n for n in listed if n in on] or [row.variant for row in evaluation.rows]
    chosen = picked.get("reference") if isinstance(picked, dict) else None
    reference = chosen if chosen in ticked else most_precise([resolve(n) for n in ticked]).notation
    named = colours([*ticked, *(row.variant for row in evaluation.rows)], reference)
    bars = training.evaluation_bars(evaluation, named)
    return [trained_view.evaluation_table(evaluation), gr.Row(visible=True), bars]


def boxes_of(mine: Any, name: str | None, picked: Any, before: Any) -> list[Any]:
    """(check boxes, their state): all variants of the list, with the base and those selected there checked.

    `mine`: the visitor's trainings. If the state is that of `before`, the boxes stay as the visitor has set them since.
    """
    listed, on = listed_variants(picked)
    base = _base(mine, name)
    names = list(dict.fromkeys([*listed, *([base] if base else [])]))
    box_state = [names, [n for n in names if n in on or n == base]]
    return [
        gr.skip() if box_state == before else gr.CheckboxGroup(choices=names, value=box_state[1]),
        box_state,
    ]


def listed_variants(picked: Any) -> tuple[list[str], list[str]]:
    """(all available notations in the list, the selected ones), as the browser sent them."""
    value = picked if isinstance(picked, dict) else {}
    rows = [r for r in value.get("rows") or [] if isinstance(r, dict) and not r.get("why")]
    names = [n for r in rows if isinstance(n := r.get("notation"), str)]
    return names, [n for n in value.get("on") or [] if isinstance(n, str)]


def _base(mine: Any, name: str | None) -> str | None:
    try:
        return mine.result(name).base if name else None
    except UserError:
        return None


async def stream(
    page: Page, name: str, on: list[str], asker: Any, picked: Any = None, owner: Any = None
) -> AsyncIterator[list[Any]]:
    """Yields values of (status, Evaluate, Stop, row of the plot, plot, table). Ends early when the visitor leaves."""
    session = getattr(asker, "session_hash", None) or ""
    try:
        page.admission.count(asker)
        if not on:
            raise UserError("No variant is selected.", "Select at least one under Variants.")
        mine = page.admission.trainings(owner)
        result = mine.result(name or "")
    except UserError as error:
        yield [problem(error), *_evaluating(False), *[gr.skip()] * 3]
        return
    stop = page.evaluation_runs.begin(session)
    try:
        line = say("Starting …")
        yield [line, *_evaluating(True), *[gr.skip()] * 3]
        rows: list[EvalRow] = []  # appended to by the background thread
        background = Background(
            lambda emit: mine.evaluate(result.name, on, stop, on_progress=emit, on_row=rows.append)
        )
        had = 0
        async for emitted in batches(background, stop):
            for fraction, message in emitted:
                line = say(message, "" if fraction is None else f"{fraction * 100:.0f} %")
            line = say("Stopping …") if stop.is_set() else line
            if len(rows) != had:
                had = len(rows)
                table, row, bars = pictured(_so_far(result, rows), picked)
                yield [line, gr.skip(), gr.skip(), row, bars, table]
            else:
                yield [line, *[gr.skip()] * 5]
        evaluation = background.future.result() if background.error is None else None
        table, row, bars = pictured(evaluation or _so_far(result, rows), picked)
        last = [row, bars, table] if rows or evaluation else [gr.skip()] * 3
        yield [over(background.error, evaluation), *_evaluating(False), *last]
    finally:
        stop.set()  # the visitor left: the generator was closed
        page.evaluation_runs.end(session, stop)


def _so_far(result: TrainingResult, rows: list[EvalRow]) -> Evaluation:
    return Evaluation(datetime.now(UTC).isoformat(timespec="seconds"), result.base, tuple(rows))


def over(error: BaseException | None, evaluation: Evaluation | None) -> str:
    """The status line at the end: done, stopped, a user error, or a defect."""
    if isinstance(error, UserError):
        return problem(error)
    if error is not None and not isinstance(error, Stopped):
        return problem(
            UserError(
                f"The evaluation failed: {type(error).__name__}: {error}".strip(),
                "Press Evaluate to try again. If it happens again, please report this message.",
            )
        )
    if evaluation is None:
        return say("Stopped. Results measured so far are kept.")
    failed = [r for r in evaluation.rows if r.problem is not None]
    tail = f"; {formatting.plural(len(failed), 'row')} failed; see the table for the reason" if failed else ""
    return say(f"Done: {formatting.plural(len({r.variant for r in evaluation.rows}), 'variant')}{tail}.")


def _evaluating(running: bool) -> list[Any]:
    return [gr.Button(interactive=not running), gr.Button(interactive=running)]
