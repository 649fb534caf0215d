"""What a link opens: a saved comparison, marked as such, or an error.

The cards, tables and plots are the same as after a run; none of them needs torch.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import gradio as gr

from comparator.core import devices
from comparator.core.errors import UserError
from comparator.core.result import Comparison
from comparator.reporting import prompt_set
from comparator.reporting.summary import template_words
from comparator.ui.form import Shown
from comparator.ui.markup import code, esc
from comparator.ui.page import PRIVATE, Page, html
from comparator.ui.results import cards, notice, share, summary
from comparator.ui.view_state import Live
from comparator.util import formatting

BUSY = UserError("A comparison is running on this page.", "Press Stop first, or open the link in a new tab.")


def build(page: Page) -> None:
    page.recording = html(elem_id="recording", js_on_load="qc.recording(element, trigger)")


def outputs(page: Page) -> list[gr.components.Component]:
    """The components of a saved comparison, in the order of `values`."""
    own = [*page.cards, page.summary, page.notice, page.recording, page.share, page.shown]
    return own + [component for _, outputs in page.at_once for component in outputs]


def settle(page: Page, event) -> None:
    """Draw the tabs after an event that bypasses the queue, which does not trigger `shown.change`."""
    event.then(
        lambda shown: shown.again() if shown.recorded else gr.skip(),
        inputs=[page.shown],
        outputs=[page.shown],
        **PRIVATE,
    )


def values(page: Page, comparison: Comparison, asker: Any, *, imported: bool = False) -> list[Any]:
    """The values of `outputs` for a saved comparison."""
    slots = len(page.cards)
    live = Live.of(comparison, recorded=True)
    drawn = [cards.render(live, column, number) for number, column in enumerate(live.columns)]
    # A document from elsewhere may have more columns than this page has slots: the last slot shows the rest.
    shown = [*drawn[: slots - 1], "".join(drawn[slots - 1 :])]
    shown += [""] * (slots - len(shown))
    link = share.render(page, comparison, asker, saved=True)
    return [
        *shown, summary.render(live), notice.say(""), banner(comparison, imported), link,
        page.admission.shown(comparison, recorded=True), *_at_once(page, Shown(comparison)),
    ]  # fmt: skip


def _at_once(page: Page, shown: Shown) -> list[Any]:
    return [value for render, _ in page.at_once for value in render(shown)]


def refusal(page: Page, problem: UserError, *, keep: bool = False) -> list[Any]:
    """Why nothing was opened, and how to continue. With `keep`, the page stays as it was."""
    if keep:
        unchanged = nothing(page)
        unchanged[len(page.cards) + 1] = notice.problem(problem)
        return unchanged
    return [
        *[""] * len(page.cards), "", notice.say(""), not_here(problem), "", Shown(), *_at_once(page, Shown())
    ]  # fmt: skip


def nothing(page: Page) -> list[Any]:
    return [gr.skip()] * len(outputs(page))


def banner(comparison: Comparison, imported: bool = False) -> str:
    """The banner of a saved comparison: when and where it was measured, its prompt and settings, and a button to repeat it."""
    environment = comparison.environment
    unlike = devices.unlike(comparison.cells)
    where = "different devices" if unlike else environment.device or "an unknown device"
    if environment.cpu and environment.cpu != environment.device:
        where += f", {environment.cpu}"
    facts = [
        ("Model", code(comparison.model)),
        ("Driver", esc(environment.driver) if environment.driver else ""),
        ("Memory", esc(f"{environment.memory_bytes / 1e9:,.1f} GB") if environment.memory_bytes else ""),
        ("Python", esc(environment.python) if environment.python else ""),
        *((esc(name), esc(version)) for name, version in sorted(environment.packages.items())),
        ("Settings", esc(settings_words(comparison))),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value)
    source = " Opened from a file: its figures were not checked." if imported else ""
    prompt = _prompt(comparison)
    return (
        '<section class="recording" aria-label="Saved comparison"><div class="recording-head">'
        f'<p role="status"><b>Saved comparison</b> · measured {esc(when(comparison.created_at))} on {esc(where)}.{source}</p>'
        '<button type="button" class="again" data-again>Run it here</button></div>'
        f"{prompt}<details><summary>Environment and settings</summary><dl>{listed}</dl></details></section>"
    )


def _prompt(comparison: Comparison) -> str:
    prompt = comparison.prompt
    system = (
        f'<p class="recording-system"><b>System prompt</b> {esc(prompt.system)}</p>' if prompt.system else ""
    )
    tokens = f" ({formatting.plural(prompt.token_count, 'token')})" if prompt.token_count is not None else ""
    return (
        f'{system}<p class="recording-label">{esc(_which(comparison))}{esc(tokens)}</p><blockquote dir="auto" tabindex="0" '
        f'aria-label="Prompt of the saved comparison">{esc(prompt.text)}</blockquote>'
    )


def _which(comparison: Comparison) -> str:
    return f"{prompt_set.title(comparison)}; the first" if comparison.prompt_set else "Prompt"


def settings_words(comparison: Comparison) -> str:
    s = comparison.settings
    parts = [
        f"at most {s.max_new_tokens:,} new tokens",
        "greedy"
        if s.temperature == 0
        else f"temperature {s.temperature:g}, top-p {s.top_p:g}, top-k {s.top_k}",
        f"repetition penalty {s.repetition_penalty:g}" if s.repetition_penalty != 1 else "",
        f"seed {s.seed}",
        formatting.plural(s.repeats, "run"),
        f"decode {s.decode}",
        template_words(comparison.prompt),
    ]
    return ", ".join(p for p in parts if p)


def not_here(problem: UserError) -> str:
    """The page of a broken link: the error, and how to continue."""
    return (
        '<section class="recording missing" role="alert"><h2>This comparison cannot be opened</h2>'
        f"<p><b>{esc(problem.problem)}</b></p><p>{esc(problem.advice)}</p>"
        '<p class="ways"><a class="again" href="?" data-fresh>Start a new comparison</a>'
        '<button type="button" class="quiet" data-history>Open the history</button></p></section>'
    )


def when(text: str) -> str:
    """2026-01-31T12:00:00+00:00 → 31 Jan 2026, 12:00 UTC."""
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            moment = moment.astimezone(UTC)
        return f"{moment.day} {moment:%b %Y, %H:%M} UTC"
    except (ValueError, OverflowError):
        return text
