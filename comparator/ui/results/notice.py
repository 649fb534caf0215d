"""The status line under Run; a screen reader announces its changes."""

from __future__ import annotations

from comparator.core.errors import UserError
from comparator.core.settings import get_settings
from comparator.ui.markup import code, esc
from comparator.ui.markup import render as render_template
from comparator.ui.page import Page, html
from comparator.ui.results import cards, error_details
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
    if at := live.answering:
        what = ("task", "document") if live.plan and live.plan.request.task else ("set", "prompt")
        return say(
            f"Answering the {what[0]}:", f"{what[1]} {at.number:,} of {at.total:,} ({at.cell.label})"
        ) + _plan(live)
    column = live.current
    if column is None:
        return say("Starting …") + _plan(live)
    what, _, detail = cards.step_words(column).partition(" · ")
    if column.state == "generating":
        what = " · ".join(filter(None, ("generating", column.message)))
    return say(f"{column.label} · {what or column.state}", f"· {detail}" if detail else "") + _plan(live)


def _plan(live: Live) -> str:
    """The stages of the run, how far it is and how long the rest takes. Not announced: it changes all the time."""
    plan = live.plan
    if plan is None:
        return ""
    left = plan.left_s
    return render_template(
        "plan.html", stages=plan.stages, percent=100 * plan.fraction,
        left=f"about {formatting.duration(formatting.rounded_duration(left))} left" if left is not None else "",
    )  # fmt: skip


def _over(live: Live, took_s: float) -> str:
    counts = {state: [c for c in live.columns if c.state == state] for state in ("done", "failed", "stopped")}
    took = f" in {formatting.seconds(took_s)}" if took_s else ""
    if (missing := _missing(live)) and not counts["failed"]:
        resume = "" if get_settings().public else " Run resumes it."
        return say(f"Stopped: {missing}. The answers so far are kept.{resume}")
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


def _missing(live: Live) -> str:
    """ "23 of 40 prompts are not answered"; "" without a set, and where it is whole."""
    result = live.comparison.prompt_set if live.comparison else None
    if result is None:
        return ""
    reached = [column for column in result.answers if any(column)] or result.answers
    if result.task:
        missing = result.task.total - len(result.prompts)
        return (
            f"{missing:,} of {formatting.plural(result.task.total, 'document')} not answered"
            if missing
            else ""
        )
    missing = sum(None in row for row in zip(*reached, strict=True))
    return (
        f"{missing:,} of {formatting.plural(len(result.prompts), 'prompt')} not answered" if missing else ""
    )
