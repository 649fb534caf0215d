"""Open a document from a file: judged as a stranger's, kept under an id of its own, shown as a recording."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from comparator.types import Problem
from comparator.ui.components import recording
from comparator.ui.desk import owner_of
from comparator.ui.page import PRIVATE, Page


def button(page: Page) -> gr.UploadButton:
    """Lays the button out where it is called; `wire` connects it once the whole page is there."""
    return gr.UploadButton(
        "Open a file …", file_types=[".json"], file_count="single", size="sm", elem_id="upload", scale=0
    )


def wire(page: Page, upload: gr.UploadButton, refresh) -> None:
    """`refresh` is called with the event once something was opened."""

    def opened(file: str | None, owner: str, request: gr.Request) -> list[Any]:
        return open_file(page, file, owner, request)

    refresh(
        upload.upload(
            opened, inputs=[upload, page.owner], outputs=recording.outputs(page), **PRIVATE
        ).then(None, js="() => qc.top()", api_visibility="private")
    )  # fmt: skip


def open_file(page: Page, file: str | None, owner: str, asker: Any) -> list[Any]:
    """The values of `recording.outputs`. The uploaded file itself is taken away at once."""
    if not file:
        return recording.nothing(page)
    try:
        if page.runs.going(getattr(asker, "session_hash", None)):
            raise recording.BUSY
        page.desk.count(asker)
        id = page.desk.store.import_file(Path(file), owner_of(owner), name="")
        return recording.values(page, page.desk.store.load(id), asker, imported=True)
    except Problem as problem:
        return recording.refusal(page, problem, keep=True)
    finally:
        Path(file).unlink(missing_ok=True)
