"""Share and Save: the link to what is shown, the link to its recipe, and the files it can be had as."""

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

from comparator import report
from comparator.share import recipe_url
from comparator.types import Comparison, Problem
from comparator.ui.components import notice
from comparator.ui.desk import base_url, link
from comparator.ui.markup import esc
from comparator.ui.page import PRIVATE, Page
from comparator.ui.state import Shown

# ending → what it is. The endings are those of `report.FORMATS`.
FILES = {
    ".html": ("Web page", "one file with plots, readable offline"),
    ".json": ("JSON", "the whole document; open it here or elsewhere"),
    ".md": ("Markdown", "to paste into an issue"),
    ".csv": ("CSV", "one row a column"),
    ".layers.csv": ("CSV of layers", "one row a layer"),
}
KEPT_S = 1800  # a file that was made for a download is taken away after this

log = logging.getLogger(__name__)


def build(page: Page) -> None:
    page.share = gr.HTML(
        "", elem_id="share", apply_default_css=False, js_on_load="qc.share(element, trigger, watch)"
    )
    # Out of sight: the menu presses it once the file is there.
    file = gr.DownloadButton("Download", visible="hidden", elem_id="download-file")
    folder = Path(tempfile.mkdtemp(prefix="quant-comparator-"))  # mode 700: nobody else's

    def make(shown: Shown, event: gr.EventData):
        try:
            return str(write(shown.comparison, str(event._data.get("ending")), folder)), gr.skip()
        except Problem as problem:
            return gr.skip(), notice.problem(problem)

    page.share.download(make, inputs=[page.shown], outputs=[file, page.notice], **PRIVATE).success(
        None, inputs=[file], js="(file) => qc.download(file)", api_visibility="private"
    )


def render(page: Page, comparison: Comparison, asker: Any, *, saved: bool) -> str:
    """The buttons for one comparison; "" where there is none. `saved` False: only files, since no link would open."""
    buttons = ""
    if saved:
        url = link(asker, comparison.id)
        buttons = (
            f'<button type="button" class="tool" id="share-link" data-copy-link="{esc(url)}" '
            f'title="{esc(url)}">Share</button>'
        )
    try:
        recipe = recipe_url(base_url(asker), comparison)
        buttons += (
            f'<button type="button" class="tool" data-copy-recipe="{esc(recipe)}" title="Copies a link that fills in '
            'the form and runs nothing">Copy recipe</button>'
        )
    except Problem:  # too long for a link, or a column that is not known here: the other ways are there
        pass
    files = "".join(
        f'<li><button type="button" data-save="{ending}"><b>{esc(title)}</b> <span>{esc(what)}</span></button></li>'
        for ending, (title, what) in FILES.items()
    )
    note = "" if saved else '<p class="soft">Not saved: it has no link. Save it as a file.</p>'
    status = _status(page) if saved else ""
    return (
        f'<div class="share" data-id="{esc(comparison.id) if saved else ""}">{buttons}<details class="menu"><summary '
        f'class="tool">Save</summary><ul>{files}</ul></details>{note}{status}</div>'
    )


def _status(page: Page) -> str:
    try:
        text = page.desk.store.status
    except Problem as problem:
        text = str(problem)
    return f'<p class="durability">{esc(text)}</p>' if text else ""


def write(comparison: Comparison | None, ending: str, folder: Path) -> Path:
    """The report as a file in a folder of its own below `folder`. Raises `Problem`."""
    if comparison is None:
        raise Problem("There is nothing to save yet.", "Press Run, or open a comparison.")
    if ending not in FILES:
        raise Problem("There is no such kind of file.", "Choose one from the list.")
    _tidy(folder)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    own = Path(tempfile.mkdtemp(dir=folder))
    date = re.sub("[^0-9-]", "", comparison.created_at[:10])
    path = own / f"quant-comparison-{date}-{comparison.id[:6]}{ending}"
    return report.write(comparison, path)


def _tidy(folder: Path) -> None:
    now = time.time()
    for old in folder.glob("*"):
        try:
            if now - old.stat().st_mtime > KEPT_S:
                shutil.rmtree(old, ignore_errors=True)
        except OSError:
            continue
