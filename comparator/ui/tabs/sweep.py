"""Sweep, in the Capacity tab: speed, latency and memory of the selected variants over batch sizes and contexts, measured here.

Subject to the same limits and queue as a comparison. Figures appear point by point; curves are drawn at the end, since
drawing takes time from what is measured beside it.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from comparator.backends import most_precise, source_kind
from comparator.capacity import sweep_runner, sweep_words
from comparator.capacity.points import Options
from comparator.capacity.sweep import Sweep
from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings, Request
from comparator.core.variant import Cell, Variant
from comparator.engine.queue import asked_by
from comparator.engines import get_engine
from comparator.reporting import export
from comparator.reporting import sweep as sweep_file
from comparator.reporting.plots import sweep as plots
from comparator.ui.form import Form
from comparator.ui.markup import code, esc, note, sized, table
from comparator.ui.page import DIRECT, PRIVATE, Page, html, picture
from comparator.ui.progress import batches, broken_off, run_buttons, running_line
from comparator.ui.results import share
from comparator.ui.results.notice import problem, say
from comparator.util import formatting, quantities
from comparator.util.streams import Background

WHY = (
    "Decodes several sequences at once, with the model and the variants selected in the panel: from which batch on is which variant "
    "faster, and how much memory does it take? The others are compared with the reference. Adapters are not applied. "
    "A server (endpoint) gets that many concurrent requests. If limits are set, the goodput counts the requests that "
    "meet them."
)


@dataclass(frozen=True)
class Job:
    """What is measured, the reference first."""

    model: str
    variants: tuple[Variant, ...]
    options: Options

    @property
    def request(self) -> Request:
        """A request that the limits can check: a column of one token for each variant."""
        settings = GenerationSettings(max_new_tokens=1, repeats=1)
        return Request(self.model, tuple(map(Cell, self.variants)), "", settings=settings, fidelity="none")


def build(page: Page) -> None:
    html(f"<h3>Speed under load</h3>{note(esc(WHY))}")
    with gr.Row(elem_classes="controls wide"):
        batch = gr.Textbox("1,4,16", label="Batches, sequences at once", max_lines=1, elem_id="sweep-batch")
        context = gr.Textbox("512", label="Contexts, tokens", max_lines=1, elem_id="sweep-context")
        new_tokens = gr.Textbox("32", label="New tokens each", max_lines=1, elem_id="sweep-new-tokens")
        ttft = gr.Textbox(
            "", label="TTFT at most", placeholder="no limit, or 0.5s", max_lines=1, elem_id="sweep-ttft"
        )
        itl = gr.Textbox(
            "",
            label="Inter-token latency at most",
            placeholder="no limit, or 50ms",
            max_lines=1,
            elem_id="sweep-itl",
        )
    with gr.Row(elem_classes="sweep-files"):
        start = gr.Button("Measure", size="sm", scale=0, elem_id="sweep-run")
        stop = gr.Button("Stop", size="sm", scale=0, interactive=False, elem_id="sweep-stop")
    status = html(say(""), elem_id="sweep-said")
    rows = html(elem_id="sweep-table")
    with gr.Row(visible=False, elem_classes="sweep-files") as files:
        saves = [
            gr.Button(f"Save as {e[1:].upper()}", size="sm", scale=0, elem_id=f"sweep{e.replace('.', '-')}")
            for e in sweep_file.FORMATS
        ]
    with gr.Row(elem_classes="plots", visible=False, elem_id="sweep-plots") as pictures:
        figures = [picture(curve.title) for curve in plots.CURVES]
    file = gr.DownloadButton(
        "Download", visible="hidden", elem_id="sweep-file"
    )  # clicked by script once the file is ready
    measured, folder = gr.State(None), Path(tempfile.mkdtemp(prefix="quant-comparator-"))

    async def run(request: gr.Request, *form: Any) -> AsyncIterator[list[Any]]:
        async for values in stream(page, form, request):
            yield values

    async def halt(request: gr.Request) -> None:
        page.sweep_runs.stop(request.session_hash)

    start.click(
        run, inputs=[page.fields["model"], page.linked, page.fields["picked"], batch, context, new_tokens, ttft, itl],
        outputs=[status, start, stop, rows, files, pictures, *figures, measured], trigger_mode="once", **PRIVATE,
    )  # fmt: skip
    stop.click(halt, **DIRECT)
    for ending, button in zip(sweep_file.FORMATS, saves, strict=True):
        button.click(
            lambda swept, ending=ending: str(write(swept, ending, folder)),
            inputs=[measured],
            outputs=[file],
            **PRIVATE,
        ).success(None, inputs=[file], js="(file) => qc.download(file)", api_visibility="private")


def job_of(form: tuple[Any, ...], page: Page) -> Job:
    """What the fields ask for, within the limits of a visitor. Raises `UserError`."""
    model, linked, picked, batch, context, new_tokens, ttft, itl = form
    name = str(model or "").strip()
    if not name or name in linked:
        raise UserError("No model is selected.", "Select one, or press Run to look up the model of the link.")
    chosen = Form(picked=picked)
    cells = chosen.cells()
    reference = chosen.reference(cells) or Cell(most_precise([cell.variant for cell in cells]))
    variants = tuple(dict.fromkeys([reference.variant, *(cell.variant for cell in cells)]))
    ttft_s, itl_s = (quantities.seconds(text) if str(text or "").strip() else None for text in (ttft, itl))
    options = Options(
        quantities.several(batch), quantities.several(context), quantities.tokens(new_tokens),
        ttft_limit_s=ttft_s, itl_limit_s=itl_s,
    )  # fmt: skip
    options.check()
    servers = sum(source_kind(variant) == "endpoint" for variant in variants)
    page.admission.limits.check_sweep(*options.tokens(len(variants) - servers, servers), options.new_tokens)
    return Job(name, variants, options)


async def stream(page: Page, form: tuple[Any, ...], asker: Any) -> AsyncIterator[list[Any]]:
    """One sweep; yields values of (status, Measure, Stop, table, row of files, row of plots, plots, what was measured). Ends
    early when the visitor leaves."""
    session, same = asker.session_hash or "", [gr.skip()] * (3 + len(plots.CURVES))
    try:
        job = job_of(form, page)
        page.admission.admit(job.request, asker)
    except UserError as error:
        yield [problem(error), *run_buttons(False), gr.skip(), *same]
        return
    stop, growing = page.sweep_runs.begin(session), None
    try:
        line = say("Starting …")
        yield [line, *run_buttons(True), "", gr.Row(visible=False), gr.Row(visible=False), *same[2:]]
        background = Background(lambda emit: _measure(page, job, stop, emit, asker))
        async for emitted in batches(background, stop):
            rows = gr.skip()
            for fraction, message in emitted:
                if isinstance(message, Sweep):
                    growing, rows = message, rendered(message)
                else:
                    line = running_line(fraction, message)
            yield [say("Stopping …") if stop.is_set() else line, gr.skip(), gr.skip(), rows, *same]
        error = background.error
        swept = growing if error else background.future.result()
        if swept is None:
            yield [broken_off(error, "The sweep", "Measure"), *run_buttons(False), gr.skip(), *same]
            return
        yield [
            broken_off(error, "The sweep", "Measure") if error else over(swept), *run_buttons(False), rendered(swept), gr.Row(visible=True),
            gr.Row(visible=True), *plots.curves(swept), swept,
        ]  # fmt: skip
    finally:
        stop.set()  # the visitor left: the generator was closed
        page.sweep_runs.end(session, stop)


def _measure(page: Page, job: Job, stop: threading.Event, emit: Any, asker: Any) -> Sweep:
    """May query the Hub for the size of the model, so never call it on the event loop."""
    admission = page.admission
    admission.judge_size(job.request)
    with asked_by(admission.visitor(asker)):
        return sweep_runner.run(
            get_engine(), job.model, job.variants, job.options, stop, emit,
            lambda swept: emit(None, swept), admission.limits.max_comparison_s,
        )  # fmt: skip


def over(swept: Sweep) -> str:
    failed = sum(1 for point in swept.points if point.error)
    tail = f"; {failed} of {len(swept.points)} points failed, with the reason below" if failed else ""
    done = "Stopped" if swept.stopped else "Done"
    return say(
        f"{done} after {formatting.duration(swept.took_s)}: {formatting.plural(len(swept.points), 'point')}{tail}."
    )


def rendered(swept: Sweep) -> str:
    """The crossover in words and a row for each point, as HTML."""
    columns = sweep_words.columns(swept)
    head = [(c.heading[0].upper() + c.heading[1:], c.why) for c in columns]
    rows = [
        [code(point.variant), *(sized(c.cell(point), c.value(point)) for c in columns[1:])]
        for point in sweep_words.ordered(swept)
    ]
    remarks = "<br>".join(map(esc, sweep_words.remarks(swept)))
    caption = sweep_words.intro(swept)
    return note(remarks, "verdict") + table(
        head, rows, caption=caption, numeric=range(1, len(columns)), name="sweep"
    )


def write(swept: Sweep, ending: str, folder: Path) -> Path:
    """The sweep as a file in a new folder below `folder`, where it is deleted after a while."""
    share.remove_old(folder)
    folder.mkdir(mode=0o700, exist_ok=True)
    path = Path(tempfile.mkdtemp(dir=folder)) / f"quant-comparator-sweep{ending}"
    export.write_text(path, sweep_file.text(swept, ending))
    return path
