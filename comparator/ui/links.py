"""What the page's own address asks for: a saved comparison, or a form that is filled in. And “Run this here”.

Answered past the queue and without the engine, so that a link opens while everything else is busy.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator.share import OpenComparison, parse_query_string
from comparator.types import Problem
from comparator.ui import fill
from comparator.ui.components import notice, recording
from comparator.ui.page import DIRECT, Page
from comparator.ui.state import Shown

FILLED = "The form is filled in from the link. Press Run to start."
AGAIN = "The form is filled in as it was for this recording. Press Run to start."


def wire(page: Page, demo: gr.Blocks) -> None:
    everything = [*recording.outputs(page), *fill.outputs(page)]
    # The visitor's key never leaves their browser but with what they ask for.
    demo.load(None, js="() => qc.visitor()", outputs=[page.owner], api_visibility="private")

    def arrive(request: gr.Request) -> list[Any]:
        return arrived(page, request)

    recording.settle(page, demo.load(arrive, outputs=everything, **DIRECT))

    def again(shown: Shown) -> list[Any]:
        return refilled(page, shown)

    page.recording.retry(
        again, inputs=[page.shown], outputs=[page.notice, *fill.outputs(page)], **DIRECT
    ).then(None, js="() => { document.querySelector('#run')?.focus(); }", api_visibility="private")


def arrived(page: Page, asker: Any) -> list[Any]:
    """The values of `recording.outputs` and `fill.outputs` for the address that the visitor came with."""
    try:
        asked = parse_query_string(query_of(asker))
        if asked is None:
            return [*recording.nothing(page), *fill.nothing(page)]
        if isinstance(asked, OpenComparison):
            store = page.desk.store
            comparison = store.load(asked.id)
            imported = store.entry(asked.id).imported
            return [*recording.values(page, comparison, asker, imported=imported), *fill.nothing(page)]
        told = recording.nothing(page)
        told[len(page.cards) + 1] = notice.say(FILLED)
        return [*told, *fill.values(page, asked)]
    except Problem as problem:
        return [*recording.refusal(page, problem), *fill.nothing(page)]


def refilled(page: Page, shown: Shown) -> list[Any]:
    """The notice, and the form as the shown comparison had it."""
    if shown.comparison is None:
        return [gr.skip(), *fill.nothing(page)]
    try:
        return [notice.say(AGAIN), *fill.values(page, fill.recipe_of_recording(shown.comparison))]
    except Problem as problem:
        return [notice.problem(problem), *fill.nothing(page)]


def query_of(asker: Any) -> str:
    """The page's own query string, repeated keys included."""
    request = getattr(asker, "request", None)
    return request.url.query if request is not None else ""
