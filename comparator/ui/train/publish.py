"""The Train tab, after a run: an adapter as a zip file, or in a repo on the Hub."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from comparator.core.errors import UserError
from comparator.ui.page import PRIVATE, Page, html
from comparator.ui.results import share
from comparator.ui.results.notice import problem, say

_OWN_LOGIN = "; leave empty to use this machine’s own login"


def build_zip(page: Page, adapter: gr.components.Component, button: gr.Button, status: gr.HTML) -> None:
    """Connect the download button; `adapter` is the field with the adapter's name."""
    # Hidden: clicked by script once the file is ready.
    file = gr.DownloadButton("Download", visible="hidden", elem_id="train-file")
    folder = Path(tempfile.mkdtemp(prefix="quant-comparator-"))  # mode 700: readable by this user only

    def make(name: str, owner: str):
        try:
            return str(archive(page.admission.trainings(owner), name, folder)), say("")
        except UserError as error:
            return gr.skip(), problem(error)

    button.click(make, inputs=[adapter, page.owner], outputs=[file, status], **PRIVATE).success(
        None, inputs=[file], js="(file) => qc.download(file)", api_visibility="private"
    )


def build_push(page: Page, adapter: gr.components.Component) -> None:
    """Lay out and connect “Push to the Hub”."""
    with gr.Accordion("Push to the Hub", open=False, elem_classes="fold", elem_id="trained-push"):
        with gr.Row(elem_classes="train-grid"):
            repo = gr.Textbox(
                "", label="Repo", placeholder="user/name", max_lines=1, lines=1, elem_id="push-repo",
                info="created if it does not exist",
            )  # fmt: skip
            token = gr.Textbox(
                "", label="Token", type="password", max_lines=1, lines=1, elem_id="push-token",
                info="used once and not stored" + ("" if page.settings.public else _OWN_LOGIN),
            )  # fmt: skip
            private = gr.Checkbox(True, label="Private", info="visible only to you", elem_id="push-private")
        push = gr.Button("Push", size="sm", elem_id="push-run")
        pushed = html(say(""), elem_id="push-said")

    def send(name: str, repo: str, token: str, private: bool, owner: str):
        return pushing(page.admission.trainings(owner), name, repo, token, private), ""

    push.click(
        send,
        inputs=[adapter, repo, token, private, page.owner],
        outputs=[pushed, token],
        trigger_mode="once",
        **PRIVATE,
    )


def archive(mine: Any, name: str, folder: Path) -> Path:
    """Write the adapter as a zip into a new folder below `folder`; returns its path."""
    share.remove_old(folder)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return mine.zipped(name or "", Path(tempfile.mkdtemp(dir=folder)))


def pushing(mine: Any, name: str, repo: str, token: str, private: bool) -> str:
    """Push an adapter to the Hub; returns the status line. The token is used for this call only."""
    if not (repo or "").strip():
        return problem(
            UserError("No repo is given.", "Enter user/name; the repo is created if it does not exist.")
        )
    login = {"token": token.strip()} if (token or "").strip() else {}  # none: this machine's own login
    try:
        address = mine.push(name or "", repo.strip(), private=bool(private), **login)
    except UserError as error:
        return problem(error)
    return say(f"Pushed: {address}")
