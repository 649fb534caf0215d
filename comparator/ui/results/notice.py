"""The status line under Run; a screen reader announces its changes."""

from __future__ import annotations

from comparator.core.errors import UserError
from comparator.ui.markup import code, esc
from comparator.ui.page import Page, html
from comparator.ui.results import error_details
from comparator.ui.view_state import Live
from comparator.util import error_log, formatting


def build(page: Page) -> None:
    page.notice = html(say(""), elem_id="notice")


def say(text: str, detail: str = "") -> str:
    """A status line. `detail` may change ten times a second and is not announced."""
    tail = f' <span aria-hidden="true">{esc(detail)}</span>' if detail else ""
    return f'<p class="notice" role="status"><span>{esc(text)}</span>{tail}</p>'


def problem(error: UserError) -> str:
    """What is wrong, what to do about it, and where its traceback is."""
    details = ""
    if error.report:
        error_log.adopt(error)
        details = error_details.where(error.report.id) + error_details.copy_button(error.report.id)
    return (
        f'<p class="notice bad" role="alert"><span><b>{esc(error.problem)}</b> {esc(error.advice)}</span></p>'
        f"{details}"
    )


def render(live: Live, stopping: bool, took_s: float) -> str:
    """The status line of a comparison."""
    if live.comparison:
        return _over(live, took_s)
    if stopping:
        return say("Stopping …")
    if live.ahead:
        now = f" Now running: {live.doing}." if live.doing else ""
        return say(
            f"Queued: {formatting.plural(live.ahead, 'run')} ahead of yours.{now} It starts automatically."
        )
    column = live.current
    if column is None:
        return say("Starting …")
    verb = {"loading": "Loading", "generating": "Generating with", "scoring": "Scoring"}[column.state]
    place = f" ({live.columns.index(column) + 1} of {len(live.columns)})" if len(live.columns) > 1 else ""
    message = column.message if column.state == "loading" else ""
    if message[:1].isupper() and message[1:2].islower():
        message = message[0].lower() + message[1:]
    share = f"{column.fraction * 100:.0f} %" if column.fraction is not None else ""
    return say(f"{verb} {column.label}{place}" + (f": {message}" if message else ""), share)


def _over(live: Live, took_s: float) -> str:
    counts = {state: [c for c in live.columns if c.state == state] for state in ("done", "failed", "stopped")}
    took = f" in {formatting.seconds(took_s)}" if took_s else ""
    noun = "column" if any(c.adapter for c in live.columns) else "variant"
    done = formatting.plural(len(counts["done"]), noun)
    if counts["stopped"]:
        return say("Stopped. Results measured so far are kept.")
    if counts["failed"]:
        names = formatting.join([c.label for c in counts["failed"]])
        return (
            f'<p class="notice bad" role="alert"><span><b>{code(names)} failed</b>; see the card for the reason. '
            f"{esc(done)} finished{esc(took)}.</span></p>"
        )
    return say(f"Done: {done}{took}.")
