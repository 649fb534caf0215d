"""One line under Run that says what is going on, in words that a screen reader reads out as they change."""

from __future__ import annotations

import gradio as gr

from comparator import words
from comparator.types import Problem
from comparator.ui.live import Live
from comparator.ui.markup import code, esc
from comparator.ui.page import Page


def build(page: Page) -> None:
    page.notice = gr.HTML(say(""), elem_id="notice", apply_default_css=False)


def say(text: str, detail: str = "") -> str:
    """A plain line. `detail` may change ten times a second and is not read out."""
    tail = f' <span aria-hidden="true">{esc(detail)}</span>' if detail else ""
    return f'<p class="notice" role="status"><span>{esc(text)}</span>{tail}</p>'


def problem(error: Problem) -> str:
    """What is wrong, and what to do about it."""
    return (
        f'<p class="notice bad" role="alert"><span><b>{esc(error.problem)}</b> {esc(error.advice)}</span></p>'
    )


def render(live: Live, stopping: bool, took_s: float) -> str:
    """The line for a comparison as it stands."""
    if live.comparison:
        return _over(live, took_s)
    if stopping:
        return say("Stopping …")
    if live.ahead:
        many = (
            words.plural(live.ahead, "run is", "runs are")
            if live.doing
            else words.plural(live.ahead, "comparison is", "comparisons are")
        )
        now = f" Now {live.doing}." if live.doing else ""
        return say(
            f"You are number {live.ahead + 1} in line: {many} ahead of yours.{now} It starts by itself."
        )
    column = live.current
    if column is None:
        return say("Starting …")
    place = f"Column {live.columns.index(column) + 1} of {len(live.columns)}"
    message = column.message
    if message[:1].isupper() and message[1:2].islower():
        message = message[0].lower() + message[1:]
    doing = {"loading": message or "loading", "generating": "generating", "scoring": "scoring"}[column.state]
    share = f"{column.fraction * 100:.0f} %" if column.fraction is not None else ""
    return say(f"{place}, {column.label}: {doing}", share)


def _over(live: Live, took_s: float) -> str:
    counts = {state: [c for c in live.columns if c.state == state] for state in ("done", "failed", "stopped")}
    took = f" in {words.seconds(took_s)}" if took_s else ""
    if counts["stopped"]:
        return say("Stopped. What was measured until then stays.")
    if counts["failed"]:
        names = words.join([c.label for c in counts["failed"]])
        done = words.plural(len(counts["done"]), "column")
        return (
            f'<p class="notice bad" role="alert"><span><b>{code(names)} failed</b>; its card says why and what to '
            f"press. {esc(done)} finished{esc(took)}.</span></p>"
        )
    return say(f"Done: {words.plural(len(counts['done']), 'column')}{took}.")
