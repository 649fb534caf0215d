"""What the page's address asks for: a saved comparison, or a filled-in form. And “Run it here”.

Bypasses the queue and the engine, so that a link opens while everything else is busy.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator.core.errors import UserError
from comparator.sources import builtin_names
from comparator.store.links import OpenComparison, parse_query_string
from comparator.ui import prefill
from comparator.ui.form import Shown
from comparator.ui.page import DIRECT, Page
from comparator.ui.panel import adapters
from comparator.ui.results import notice, saved_comparison

FILLED = "The form is filled in from the link. Press Run to start."
AGAIN = "The form is filled in with the settings of this comparison. Press Run to start."


def wire(page: Page, demo: gr.Blocks) -> None:
    everything = [*saved_comparison.outputs(page), *prefill.outputs(page), page.linked]
    # The visitor's key is stored in their browser and sent only with their requests.
    demo.load(None, js="() => qc.visitor()", outputs=[page.owner], api_visibility="private")

    def arrive(request: gr.Request) -> list[Any]:
        return arrived(page, request)

    saved_comparison.settle(page, demo.load(arrive, outputs=everything, **DIRECT))

    def again(shown: Shown) -> list[Any]:
        return refilled(page, shown)

    page.recording.retry(
        again, inputs=[page.shown], outputs=[page.notice, *prefill.outputs(page)], **DIRECT
    ).then(None, js="() => { document.querySelector('#run')?.focus(); }", api_visibility="private")


def arrived(page: Page, asker: Any) -> list[Any]:
    """Values of `saved_comparison.outputs`, `prefill.outputs` and `page.linked` for the address of the page.

    Opening a stranger's link must not make this server download anything, so what it names is looked up at Run.
    """
    nothing = [*prefill.nothing(page), gr.skip()]
    try:
        target = parse_query_string(query_of(asker))
        if target is None:
            return [*saved_comparison.nothing(page), *nothing]
        if isinstance(target, OpenComparison):
            store = page.admission.store
            comparison = store.load(target.id)
            imported = store.entry(target.id).imported
            return [
                *saved_comparison.values(page, comparison, asker, imported=imported),
                *nothing,
            ]
        values = saved_comparison.nothing(page)
        values[len(page.cards) + 1] = notice.say(FILLED)
        known = {page.settings.model, *builtin_names(), *adapters.all_here()}
        linked = tuple({target.model, *target.adapters} - known - {None})
        return [*values, *prefill.values(page, target), linked]
    except UserError as problem:
        return [*saved_comparison.refusal(page, problem), *nothing]


def refilled(page: Page, shown: Shown) -> list[Any]:
    """The notice, and the form with the settings of the shown comparison."""
    if shown.comparison is None:
        return [gr.skip(), *prefill.nothing(page)]
    try:
        return [notice.say(AGAIN), *prefill.values(page, prefill.recipe_of_recording(shown.comparison))]
    except UserError as problem:
        return [notice.problem(problem), *prefill.nothing(page)]


def query_of(asker: Any) -> str:
    """The page's own query string, repeated keys included."""
    request = getattr(asker, "request", None)
    return request.url.query if request is not None else ""
