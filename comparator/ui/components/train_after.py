"""The Train tab, after a run: the adapters that were trained here, and what can be done with one.

Compare now, every variant with and without it, a zip, the Hub, delete. An adapter is listed on the left the moment it
is done.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gradio as gr

from comparator import plots_training, words
from comparator.backends import most_precise, resolve
from comparator.plots import colours
from comparator.training import jobs
from comparator.training.types import EvalRow, Evaluation, TrainingResult
from comparator.types import Problem, Stopped
from comparator.ui.components import adapters, notice, share, train_results, variants
from comparator.ui.components.notice import problem, say
from comparator.ui.handlers import PULSE_S, TICK_S, Pump
from comparator.ui.markup import note
from comparator.ui.page import DIRECT, PRIVATE, Choice, Page, Ticks, picture
from comparator.ui.state import NO_ADAPTER

SHOWN = 9  # values of `After.outputs`
RUN = "() => setTimeout(() => qc.compareNow(), 150)"  # once the line above has been drawn
REALLY = "(name, ...rest) => [name && confirm(`Delete the adapter ${name}? Its files are removed.`) ? name : '', ...rest]"


@dataclass
class After:
    nothing: gr.HTML
    whole: gr.Column
    chosen: gr.components.Component
    about: gr.HTML
    measured: gr.HTML
    pictures: gr.Row
    bars: gr.Plot

    def inputs(self, page: Page) -> list[gr.components.Component]:
        return [page.adapter_names, page.fields["adapters"], self.chosen, page.fields["picked"]]

    def outputs(self, page: Page) -> list[gr.components.Component]:
        """What changes when an adapter comes or goes; the list of adapters last."""
        own = [self.nothing, self.whole, self.chosen, self.about, self.measured, self.pictures, self.bars]
        return [*own, page.adapter_names, page.fields["adapters"]]


def build(page: Page) -> After:
    gr.HTML("<h3>Trained here</h3>", apply_default_css=False)
    nothing = gr.HTML(note(train_results.NOTHING), apply_default_css=False)
    with gr.Column(visible=False, elem_id="trained") as whole:
        chosen = Choice([], label="Adapter", filterable=False, elem_id="trained-name")
        about = gr.HTML("", elem_id="trained-about", apply_default_css=False)
        with gr.Row(elem_classes="train-actions"):
            compare = gr.Button("Compare now", variant="primary", elem_id="trained-compare", scale=0)
            zipped = gr.Button("Download as zip", elem_id="trained-zip", scale=0)
            delete = gr.Button("Delete", elem_id="trained-delete", scale=0)
            said = gr.HTML(say(""), elem_id="trained-said", apply_default_css=False)
        gr.HTML(
            "<h4>How does it do on the others?</h4>"
            + note(
                "Loss and perplexity on what was held back, for each variant, without the adapter and with it."
            ),
            apply_default_css=False,
        )
        on = Ticks([], label="Variants", elem_id="trained-on")
        with gr.Row(elem_classes="train-actions"):
            start = gr.Button("Evaluate", elem_id="trained-evaluate", scale=0)
            stop = gr.Button("Stop", elem_id="trained-evaluate-stop", interactive=False, scale=0)
            told = gr.HTML(say(""), elem_id="trained-told", apply_default_css=False)
        with gr.Row(elem_classes="plots one", visible=False) as pictures:
            bars = picture("Loss on what was held back")
        measured = gr.HTML("", elem_id="trained-table", apply_default_css=False)
        with gr.Accordion("Push to the Hub", open=False, elem_classes="fold", elem_id="trained-push"):
            with gr.Row(elem_classes="train-grid"):
                repo = gr.Textbox(
                    "", label="Repo", placeholder="user/name", max_lines=1, lines=1, elem_id="push-repo",
                    info="made if it is not there",
                )  # fmt: skip
                token = gr.Textbox(
                    "", label="Token", type="password", max_lines=1, lines=1, elem_id="push-token",
                    info="used once and kept nowhere; empty: this machine's own login",
                )  # fmt: skip
                private = gr.Checkbox(True, label="Private", info="only you see it", elem_id="push-private")
            push = gr.Button("Push", size="sm", elem_id="push-run")
            pushed = gr.HTML(say(""), elem_id="push-said", apply_default_css=False)
    # Out of sight: pressed once the file is there.
    file = gr.DownloadButton("Download", visible="hidden", elem_id="train-file")
    folder = Path(tempfile.mkdtemp(prefix="quant-comparator-"))  # mode 700: nobody else's
    after = After(nothing, whole, chosen, about, measured, pictures, bars)
    laid = gr.State(None)  # the boxes as the list gave them last

    def show(name: str, picked: Any, before: Any):
        return *shown(name, picked), *boxes_of(name, picked, before)

    def make(name: str):
        try:
            return str(archive(name, folder)), say("")
        except Problem as wrong:
            return gr.skip(), problem(wrong)

    def send(name: str, repo: str, token: str, private: bool):
        return pushing(name, repo, token, private), ""

    def away(name: str, *left: Any):
        return removed(name, left)

    def compare_now(name: str, picked: Any, listed: list[str], request: gr.Request):
        return filled(page, name, picked, listed, getattr(request, "session_hash", None))

    async def evaluate(
        request: gr.Request, name: str, on: list[str], picked: Any
    ) -> AsyncIterator[list[Any]]:
        async for sent in stream(page, name, on, request, picked):
            yield sent

    async def halt(request: gr.Request) -> None:
        page.evaluations.stop(request.session_hash)

    picked = page.fields["picked"]
    gr.on(
        [chosen.change, picked.change], show, inputs=[chosen, picked, laid],
        outputs=[about, measured, pictures, bars, on, laid], trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    compare.click(
        compare_now, inputs=[chosen, picked, page.adapter_names], outputs=_form(page), **PRIVATE
    ).then(None, js=RUN, api_visibility="private")
    zipped.click(make, inputs=[chosen], outputs=[file, said], **PRIVATE).success(
        None, inputs=[file], js="(file) => qc.download(file)", api_visibility="private"
    )
    delete.click(
        away, inputs=[chosen, *after.inputs(page)],
        outputs=[said, *after.outputs(page)], js=REALLY, **PRIVATE,
    )  # fmt: skip
    push.click(
        send, inputs=[chosen, repo, token, private], outputs=[pushed, token], trigger_mode="once", **PRIVATE
    )
    start.click(
        evaluate, inputs=[chosen, on, picked], outputs=[told, start, stop, pictures, bars, measured],
        trigger_mode="once", **PRIVATE,
    )  # fmt: skip
    stop.click(halt, **DIRECT)
    return after


# ---------------------------------------------------------------- the list


def values(left: tuple[Any, ...], name: str = "") -> list[Any]:
    """The values of `After.outputs`; `left` are those of `After.inputs`. `name` is chosen where it is there, else what
    was chosen; what is ticked stays ticked."""
    listed, worn, before, picked = left
    found = jobs.get_trainings().finished()
    names = [r.name for r in found]
    chosen = next((n for n in (name, before, *names) if n in names), None)
    now = adapters.all_here()
    listed = [*(a for a in listed if a in now or not _ours(a)), *(a for a in now if a not in listed)]
    boxes = gr.CheckboxGroup(choices=listed, value=[a for a in worn if a in listed] or [NO_ADAPTER])
    about, measured, pictures, bars = shown(chosen, picked)
    dropdown = gr.Dropdown(choices=train_results.choices(found), value=chosen)
    some = [gr.HTML(visible=not found), gr.Column(visible=bool(found))]
    return [*some, dropdown, about, measured, pictures, bars, listed, boxes]


def _ours(notation: str) -> bool:
    """Whether it has the form of a trained adapter's name: those that are gone leave the list."""
    return not any(mark in notation for mark in "/\\.~@*:")


def shown(name: str | None, picked: Any = None) -> list[Any]:
    """(what it is, its evaluation as a table, the pictures' row, the bars)."""
    if not name:
        return ["", "", gr.Row(visible=False), gr.skip()]
    try:
        result = jobs.get_trainings().result(name)
    except Problem as wrong:
        return [problem(wrong), "", gr.Row(visible=False), gr.skip()]
    return [train_results.described(result), *pictured(result.evaluation, picked)]


def pictured(found: Evaluation | None, picked: Any) -> list[Any]:
    """(table, the pictures' row, bars)"""
    if found is None or not found.rows:
        return ["", gr.Row(visible=False), gr.skip()]
    # The colours that the list on the left has, so that a variant has one everywhere.
    listed, on = _listed(picked)
    ticked = [n for n in listed if n in on] or [row.variant for row in found.rows]
    chosen = picked.get("reference") if isinstance(picked, dict) else None
    reference = chosen if chosen in ticked else most_precise([resolve(n) for n in ticked]).notation
    named = colours([*ticked, *(row.variant for row in found.rows)], reference)
    bars = plots_training.evaluation_bars(found, named)
    return [train_results.evaluation(found), gr.Row(visible=True), bars]


def boxes_of(name: str | None, picked: Any, before: Any) -> list[Any]:
    """(the boxes, how they are laid now). They are all the variants in the list, with those ticked that are ticked there,
    and the base. Where that is how they were laid `before`, they stay as the visitor has ticked them since."""
    listed, on = _listed(picked)
    base = _base(name)
    names = list(dict.fromkeys([*listed, *([base] if base else [])]))
    laid = [names, [n for n in names if n in on or n == base]]
    return [gr.skip() if laid == before else gr.CheckboxGroup(choices=names, value=laid[1]), laid]


def _listed(picked: Any) -> tuple[list[str], list[str]]:
    """(every notation in the list that can be had here, the ticked ones), as the browser sent them."""
    value = picked if isinstance(picked, dict) else {}
    rows = [r for r in value.get("rows") or [] if isinstance(r, dict) and not r.get("why")]
    names = [n for r in rows if isinstance(n := r.get("notation"), str)]
    return names, [n for n in value.get("on") or [] if isinstance(n, str)]


def _base(name: str | None) -> str | None:
    try:
        return jobs.get_trainings().result(name).base if name else None
    except Problem:
        return None


# ---------------------------------------------------------------- what the buttons do


def _form(page: Page) -> list[gr.components.Component]:
    names = ("model", "picked", "adapters", "columns", "known_columns")
    return [page.notice, *(page.fields[n] for n in names), page.adapter_names, page.columns_off]


def filled(page: Page, name: str, picked: Any, listed: list[str], session: str | None) -> list[Any]:
    """The form for variants × {none, this adapter}: the ticked variants, and the base it was trained on."""
    try:
        if page.runs.going(session):
            raise Problem(
                "A comparison is running on this page.", "Press Stop above first, then Compare now."
            )
        result = jobs.get_trainings().result(name or "")
        picked, left = _with_base(picked, result, page.settings.max_columns)
    except Problem as wrong:
        return [notice.problem(wrong), *[gr.skip()] * 7]
    names = list(dict.fromkeys([*listed, result.adapter]))
    on = [NO_ADAPTER, result.adapter]
    boxes, labels = adapters.grid(picked, on, [])
    cut = f" {words.join(left)} had no room." if left else ""
    said = notice.say(f"{result.name}: every variant with and without it.{cut}")
    return [said, result.model, picked, gr.CheckboxGroup(choices=names, value=on), boxes, labels, names, []]


def _with_base(picked: Any, result: TrainingResult, most: int) -> tuple[dict[str, Any], list[str]]:
    """The list with the base ticked too, and what had to be unticked because two columns each are too many."""
    value = picked if isinstance(picked, dict) else variants.picked(most)
    _, on = _listed(value)
    if result.base not in on:
        value = variants.with_added(value, result.base, most)
        on = value["on"]
    room = max(1, most // 2)
    kept = [result.base, *(n for n in on if n != result.base)][:room]
    return {**value, "on": [n for n in on if n in kept]}, [n for n in on if n not in kept]


def archive(name: str, folder: Path) -> Path:
    """The adapter as a zip in a folder of its own below `folder`."""
    share._tidy(folder)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return jobs.get_trainings().zipped(name or "", Path(tempfile.mkdtemp(dir=folder)))


def pushing(name: str, repo: str, token: str, private: bool) -> str:
    """The line under Push. The token goes no further than this call."""
    if not (repo or "").strip():
        return problem(Problem("No repo is named.", "Write user/name; it is made if it is not there."))
    given = {"token": token.strip()} if (token or "").strip() else {}  # none: this machine's own login
    try:
        address = jobs.get_trainings().push(name or "", repo.strip(), private=bool(private), **given)
    except Problem as wrong:
        return problem(wrong)
    return say(f"Pushed: {address}")


def removed(name: str, left: tuple[Any, ...]) -> list[Any]:
    nothing = [gr.skip()] * SHOWN
    if not name:
        return [say(""), *nothing]  # the question was answered with no
    try:
        jobs.get_trainings().remove(name)
    except Problem as wrong:
        return [problem(wrong), *nothing]
    return [say(f"Deleted {name}."), *values(left)]


# ---------------------------------------------------------------- every variant, with and without


async def stream(
    page: Page, name: str, on: list[str], asker: Any, picked: Any = None
) -> AsyncIterator[list[Any]]:
    """Values of (line, Evaluate, Stop, the pictures' row, bars, table). Ends early when the visitor leaves."""
    session = getattr(asker, "session_hash", None) or ""
    try:
        page.desk.count(asker)
        if not on:
            raise Problem("No variant is ticked.", "Tick one under Variants.")
        result = jobs.get_trainings().result(name or "")
    except Problem as wrong:
        yield [problem(wrong), *_evaluating(False), *[gr.skip()] * 3]
        return
    stop = page.evaluations.begin(session)
    try:
        line, told = say("Starting …"), time.monotonic()
        yield [line, *_evaluating(True), *[gr.skip()] * 3]
        pump = Pump(jobs.get_trainings().evaluate(result.name, on, cancel=stop))
        rows: list[EvalRow] = []
        while True:
            ended, before, had = pump.ended.is_set(), line, len(rows)
            final = _take(pump.drain(), rows)
            line = final.pop("line", line)
            if ended:
                break
            line = say("Stopping …") if stop.is_set() else line
            if len(rows) != had:
                table, row, bars = pictured(_so_far(result, rows), picked)
                yield [line, gr.skip(), gr.skip(), row, bars, table]
            elif line != before or time.monotonic() - told > PULSE_S:
                told = time.monotonic()
                yield [line, *[gr.skip()] * 5]
            await asyncio.sleep(TICK_S)
        table, row, bars = pictured(final.get("evaluation") or _so_far(result, rows), picked)
        kept = [row, bars, table] if rows or "evaluation" in final else [gr.skip()] * 3
        yield [over(pump.error, final.get("evaluation")), *_evaluating(False), *kept]
    finally:
        stop.set()  # a visitor who left: the generator was closed in the middle
        page.evaluations.end(session, stop)


def _take(items: list[Any], rows: list[EvalRow]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in items:
        if isinstance(item, EvalRow):
            rows.append(item)
        elif isinstance(item, Evaluation):
            found["evaluation"] = item
        elif getattr(item, "message", None):
            share_done = getattr(item, "fraction", None)
            found["line"] = say(item.message, "" if share_done is None else f"{share_done * 100:.0f} %")
    return found


def _so_far(result: TrainingResult, rows: list[EvalRow]) -> Evaluation:
    return Evaluation(datetime.now(UTC).isoformat(timespec="seconds"), result.base, tuple(rows))


def over(error: BaseException | None, found: Evaluation | None) -> str:
    """The line when it has ended: done, stopped, something to mend, or a defect."""
    if isinstance(error, Problem):
        return problem(error)
    if error is not None and not isinstance(error, Stopped):
        return problem(
            Problem(
                f"The evaluation broke off: {type(error).__name__}: {error}".strip(),
                "Press Evaluate to try again. If it happens again, please report it with these words.",
            )
        )
    if found is None:
        return say("Stopped. What was measured until then stays.")
    failed = [r for r in found.rows if r.problem is not None]
    tail = f"; {words.plural(len(failed), 'row')} failed, and the table says why" if failed else ""
    return say(f"Done: {words.plural(len({r.variant for r in found.rows}), 'variant')}{tail}.")


def _evaluating(running: bool) -> list[Any]:
    return [gr.Button(interactive=not running), gr.Button(interactive=running)]
