"""Share and Save: a link to the comparison, a link to its settings, and files for download."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import gradio as gr

from comparator.core.errors import UserError
from comparator.core.result import Comparison
from comparator.reporting import export
from comparator.store.links import recipe_url
from comparator.ui.admission import base_url, link
from comparator.ui.form import Shown
from comparator.ui.gradio_compat import event_data
from comparator.ui.markup import esc
from comparator.ui.page import PRIVATE, Page, html
from comparator.ui.results import notice

# suffix → title and description; the suffixes of `report.FORMATS`
FILES = {
    ".html": ("Web page", "one file with plots, works offline"),
    ".json": ("JSON", "the full document; can be opened here again"),
    ".md": ("Markdown", "to paste into an issue"),
    ".csv": ("CSV", "one row per variant"),
    ".prompts.csv": ("CSV of prompts", "one row per prompt and variant"),
    ".layers.csv": ("CSV of layers", "one row per layer"),
}
MAX_AGE_S = 1800  # files made for a download are deleted after this

log = logging.getLogger(__name__)


def build(page: Page) -> None:
    page.share = html(elem_id="share", js_on_load="qc.share(element, trigger, watch)")
    # Hidden: clicked by script once the file is ready.
    file = gr.DownloadButton("Download", visible="hidden", elem_id="download-file")
    folder = Path(tempfile.mkdtemp(prefix="quant-comparator-"))  # mode 700: readable by this user only

    def make(shown: Shown, event: gr.EventData):
        try:
            return str(write(shown.comparison, str(event_data(event).get("ending")), folder)), gr.skip()
        except UserError as problem:
            return gr.skip(), notice.problem(problem)

    page.share.download(make, inputs=[page.shown], outputs=[file, page.notice], **PRIVATE).success(
        None, inputs=[file], js="(file) => qc.download(file)", api_visibility="private"
    )


def render(page: Page, comparison: Comparison, asker: Any, *, saved: bool) -> str:
    """The buttons for one comparison. With `saved` False there are only files, because a link would not open."""
    buttons = ""
    if saved:
        url = link(asker, comparison.id)
        buttons = (
            f'<button type="button" class="tool" id="share-link" data-copy-link="{esc(url)}" '
            f'title="{esc(url)}">Share</button>'
        )
    try:
        if comparison.prompt_set:
            raise UserError("A prompt set does not fit into a link.")
        recipe = recipe_url(base_url(asker), comparison)
        buttons += (
            f'<button type="button" class="tool" data-copy-recipe="{esc(recipe)}" title="Copies a link that fills in '
            'the form without running it">Copy recipe</button>'
        )
    except UserError:  # too long for a link, or an unknown method: files still work
        pass
    files = "".join(
        f'<li><button type="button" data-save="{ending}"><b>{esc(title)}</b> <span>{esc(description)}</span></button></li>'
        for ending, (title, description) in FILES.items()
        if ending != ".prompts.csv" or comparison.prompt_set
    )
    note = (
        ""
        if saved
        else '<p class="soft">Not saved on the server, so there is no link. Save it as a file.</p>'
    )
    status = _status(page) if saved else ""
    return (
        f'<div class="share" data-id="{esc(comparison.id) if saved else ""}">{buttons}<details class="menu"><summary '
        f'class="tool">Save</summary><ul>{files}</ul></details>{note}{status}</div>'
    )


def _status(page: Page) -> str:
    try:
        text = page.admission.store.status
    except UserError as problem:
        text = str(problem)
    return f'<p class="durability">{esc(text)}</p>' if text else ""


def write(comparison: Comparison | None, ending: str, folder: Path) -> Path:
    """Write the report into a new folder below `folder`; returns its path. Raises `UserError`."""
    if comparison is None:
        raise UserError("There is nothing to save yet.", "Press Run, or open a comparison.")
    if ending not in FILES:
        raise UserError("Unknown file format.", "Select one from the list.")
    remove_old(folder)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=folder))
    date = re.sub("[^0-9-]", "", comparison.created_at[:10])
    path = own / f"quant-comparison-{date}-{comparison.id[:6]}{ending}"
    return export.write(comparison, path)


def remove_old(folder: Path) -> None:
    now = time.time()
    for old in folder.glob("*"):
        try:
            if now - old.stat().st_mtime > MAX_AGE_S:
                shutil.rmtree(old, ignore_errors=True)
        except OSError:
            continue
