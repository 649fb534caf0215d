"""How long a run of the form would take, beside Run: from how long earlier runs took on this machine."""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator.comparison.pace import Pace
from comparator.comparison.plan import Plan
from comparator.core.errors import UserError
from comparator.core.request import Request
from comparator.ui.form import Form
from comparator.ui.markup import esc
from comparator.ui.page import DIRECT, Page
from comparator.util import formatting

FIELDS = (
    "model",
    "picked",
    "adapters",
    "columns",
    "known_columns",
    "max_new_tokens",
    "repeats",
    "fidelity",
    "prompt_set",
    "set_text",
)
WHY = "Estimated from earlier runs on this machine (loading, answering, scoring), for an answer of the maximum length."
UNKNOWN = "This model has not run on this machine yet, so there is no estimate."


def wire(page: Page, demo: gr.Blocks, after_run) -> None:
    """Connect the line beside Run to the fields that it depends on. after_run: the event of a run, which measures again."""

    def show(*values: Any) -> str:
        form = Form(**dict(zip(FIELDS, values, strict=True)))
        return line(form, Pace(page.settings.cache_dir), page.settings.repeats)

    fields = [page.fields[name] for name in FIELDS]
    wiring = {"inputs": fields, "outputs": [page.estimate], **DIRECT}
    gr.on([demo.load, *(f.change for f in fields)], show, trigger_mode="always_last", **wiring)
    after_run.then(show, **wiring)


def line(form: Form, pace: Pace, repeats: int) -> str:
    """The line as HTML; "" for a form that cannot be run as it is."""
    seconds = estimate(form, pace, repeats)
    if seconds is None:
        return ""
    if seconds < 0:
        return f'<p class="estimate" title="{esc(UNKNOWN)}">no estimate yet</p>'
    about = formatting.duration(formatting.rounded_duration(seconds))
    return f'<p class="estimate" title="{esc(WHY)}">Takes about {esc(about)}</p>'


def estimate(form: Form, pace: Pace, repeats: int) -> float | None:
    """Seconds; −1 where nothing is known of the model, None for a form that cannot be run."""
    try:
        off = set(form.known_columns or ()) - set(form.columns or ())
        cells = tuple(cell for cell in form.cells() if cell.label not in off)
        if not cells:
            return None
        request = Request(
            model=str(form.model or "").strip(), cells=cells, prompt="", settings=form.generation(),
            prompts=form.prompts(),
            fidelity=form.fidelity if form.fidelity in ("prompt", "text", "none") else "prompt",
        )  # fmt: skip
    except (UserError, TypeError):
        return None
    left = Plan(request, pace, repeats).left_s
    return -1.0 if left is None else left
