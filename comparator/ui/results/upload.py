"""Open a document from a file: validated as untrusted, saved under a new id, shown as a saved comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from comparator.core.errors import UserError
from comparator.ui.admission import owner_of
from comparator.ui.page import PRIVATE, Page
from comparator.ui.results import saved_comparison


def button(page: Page) -> gr.UploadButton:
    """Lay out the button; `wire` connects it once the page is complete."""
    return gr.UploadButton(
        "Open a file …", file_types=[".json"], file_count="single", size="sm", elem_id="upload", scale=0
    )


def wire(page: Page, upload: gr.UploadButton, refresh) -> None:
    """Connect the button; `refresh` is called with its event."""

    def opened(file: str | None, owner: str, request: gr.Request) -> list[Any]:
        return open_file(page, file, owner, request)

    refresh(
        upload.upload(
            opened, inputs=[upload, page.owner], outputs=saved_comparison.outputs(page), **PRIVATE
        ).then(None, js="() => qc.top()", api_visibility="private")
    )  # fmt: skip


def open_file(page: Page, file: str | None, owner: str, asker: Any) -> list[Any]:
    """The values of `saved_comparison.outputs`. The uploaded file is deleted."""
    if not file:
        return saved_comparison.nothing(page)
    try:
        if page.runs.going(getattr(asker, "session_hash", None)):
            raise saved_comparison.BUSY
        page.admission.count(asker)
        page.admission.require_room()
        id = page.admission.store.import_file(Path(file), owner_of(owner), name="")
        return saved_comparison.values(page, page.admission.store.load(id), asker, imported=True)
    except UserError as problem:
        return saved_comparison.refusal(page, problem, keep=True)
    finally:
        Path(file).unlink(missing_ok=True)
