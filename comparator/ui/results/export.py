"""Export a variant: one of the shown columns as a checkpoint with its model card, in a folder of the data folder.

The same code as the command `export`. Not on a public server, where a visitor would fill the disk with checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from comparator.backends import resolve
from comparator.core.errors import UserError
from comparator.core.result import CellResult
from comparator.core.variant import parse_adapter
from comparator.engines import get_engine
from comparator.exporting import Exported, ExportRequest, export
from comparator.fidelity import verdict
from comparator.reporting import prompt_set
from comparator.reporting.recommendation import recommend
from comparator.sources import hub_upload
from comparator.ui.admission import link
from comparator.ui.form import Shown
from comparator.ui.markup import esc
from comparator.ui.page import DIRECT, PRIVATE, Choice, Page, html
from comparator.ui.progress import batches, broken_off, run_buttons, running_line
from comparator.ui.results.notice import say
from comparator.util.streams import Background

FOLDER = "exports"


def build(page: Page) -> None:
    if page.settings.public:
        return
    with gr.Accordion(
        "Export a variant", open=False, visible=False, elem_classes="fold", elem_id="export"
    ) as whole:
        with gr.Row(elem_classes="train-grid"):
            column = Choice([], label="Variant", filterable=False, elem_id="export-column")
            name = gr.Textbox(
                "",
                label="Folder",
                max_lines=1,
                info=f"new, in {FOLDER} of the data folder",
                elem_id="export-name",
            )
            repo = gr.Textbox(
                "", label="Hub repo", max_lines=1, placeholder="user/name", elem_id="export-repo",
                info="optional: uploaded with this machine's own login; a new repo is private",
            )  # fmt: skip
        with gr.Row(elem_classes="controls"):
            start = gr.Button("Export", size="sm", scale=0, elem_id="export-run")
            stop = gr.Button("Stop", size="sm", scale=0, interactive=False, elem_id="export-stop")
        status = html(say(""), elem_id="export-said")

    async def run(
        request: gr.Request, shown: Shown, label: str, folder: str, repo: str
    ) -> AsyncIterator[list[Any]]:
        async for values in stream(page, shown, label, folder, repo, request):
            yield values

    async def halt(request: gr.Request) -> None:
        page.export_runs.stop(request.session_hash)  # only the stream writes the status line

    page.on_comparison(offer, [whole, column, name, status])
    column.change(lambda label: folder_name(label or ""), inputs=[column], outputs=[name], **PRIVATE)
    start.click(
        run,
        inputs=[page.shown, column, name, repo],
        outputs=[status, start, stop],
        trigger_mode="once",
        **PRIVATE,
    )
    stop.click(halt, **DIRECT)


def offer(shown: Shown):
    """The columns that answered; the one that the answer on top recommends for balance is preselected."""
    comparison = shown.comparison
    cells = [c for c in comparison.cells if c.status == "ok"] if comparison else []
    if comparison is None or not cells:
        return gr.Accordion(visible=False), gr.Dropdown([], value=None), "", say("")
    labels = [c.label for c in cells]
    answer = recommend(comparison.cells, verdict.reference_cell(comparison), prompt_set.summaries(comparison))
    chosen = next((c.cell.label for c in answer.choices if c.cell), labels[0]) if answer else labels[0]
    return gr.Accordion(visible=True), gr.Dropdown(labels, value=chosen), folder_name(chosen), say("")


def folder_name(label: str) -> str:
    """`nf4:dq + pirate` → nf4-dq-pirate."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", label).strip("-.")[:80]


def request_of(page: Page, shown: Shown, label: str, folder: str, asker: Any) -> ExportRequest:
    """Raises `UserError` for a column that is not there, and for a folder's name that is none."""
    comparison = shown.comparison
    cell = _cell(shown, label)
    name = str(folder or "").strip()
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", name):
        raise UserError(f"“{name[:40]}” is not the name of a folder.", "Use letters, digits, dots, - and _.")
    assert comparison is not None
    return ExportRequest(
        comparison.model, resolve(cell.variant), page.settings.data_dir.expanduser().absolute() / FOLDER / name,
        parse_adapter(cell.adapter) if cell.adapter else None, comparison,
        link(asker, comparison.id) if page.admission.holds(comparison.id) else None,
    )  # fmt: skip


def _cell(shown: Shown, label: str) -> CellResult:
    cells = shown.comparison.cells if shown.comparison else ()
    cell = next((c for c in cells if c.label == label and c.status == "ok"), None)
    if cell is None:
        raise UserError(
            "No variant with this name has answered.", "Select one from the list, or press Run first."
        )
    return cell


async def stream(
    page: Page, shown: Shown, label: str, folder: str, repo: str, asker: Any
) -> AsyncIterator[list[Any]]:
    """One export; yields values of (status, Export, Stop). Ends early when the visitor leaves."""
    session, repo = asker.session_hash or "", str(repo or "").strip()
    stop = page.export_runs.begin(session)
    try:
        yield [say("Starting …"), *run_buttons(True)]

        def work(emit: Any) -> tuple[Exported, str]:
            if page.settings.public:
                raise UserError(
                    "Exporting is disabled on a public server.", "Use the export command on your own machine."
                )
            if repo:
                hub_upload.check(repo)
            request = request_of(page, shown, label, folder, asker)
            page.admission.limits.check_source(request.model)
            page.admission.limits.check_cell(request.cell)
            made = export(get_engine(), request, stop, lambda *status: emit(*status))
            if not repo:
                return made, ""
            emit(None, f"uploading to {repo}")
            return made, hub_upload.push(
                made.folder, repo, f"{label}, exported by Quant Comparator", private=True
            )

        background = Background(work)
        async for emitted in batches(background, stop):
            for fraction, message in emitted[-1:]:
                yield [
                    say("Stopping …") if stop.is_set() else running_line(fraction, message),
                    *_unchanged(2),
                ]
        if background.error is not None:
            yield [broken_off(background.error, "The export", "Export"), *run_buttons(False)]
            return
        made, address = background.future.result()
        yield [over(made, address), *run_buttons(False)]
    finally:
        stop.set()  # the visitor left: the generator was closed
        page.export_runs.end(session, stop)


def over(made: Exported, address: str) -> str:
    uploaded = f" Uploaded to {address}." if address else ""
    return (
        f'<p class="notice" role="status"><span><b>Written to {esc(str(made.folder))}</b> ({made.bytes / 1e6:,.0f} MB), with a model '
        f"card of the measured figures. Use it here as <code>{esc(made.notation)}</code>.{esc(uploaded)}</span></p>"
    )


def _unchanged(count: int) -> list[Any]:
    return [gr.skip() for _ in range(count)]
