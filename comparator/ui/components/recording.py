"""What a link opens: a saved comparison on the page, marked as the recording it is, or a clear word why not.

The cards, tables and plots are the same as after a run; nothing of torch is needed for any of it.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import gradio as gr

from comparator import devices, words
from comparator.types import Comparison, Problem
from comparator.ui.components import cards, notice, share, summary
from comparator.ui.live import Live
from comparator.ui.markup import code, esc
from comparator.ui.page import PRIVATE, Page
from comparator.ui.state import Shown

BUSY = Problem("A comparison is running on this page.", "Press Stop first, or open the link in a new tab.")


def build(page: Page) -> None:
    # Out of sight: the visitor's key, written by their browser, so that their history is theirs.
    page.owner = gr.Textbox("", visible="hidden", elem_id="visitor", label="Visitor", container=False)
    page.recording = gr.HTML(
        "", elem_id="recording", apply_default_css=False, js_on_load="qc.recording(element, trigger)"
    )


def outputs(page: Page) -> list[gr.components.Component]:
    """Where a recording goes, in the order of `values`."""
    return [*page.cards, page.summary, page.notice, page.recording, page.share, page.shown]


def settle(page: Page, event) -> None:
    """Draw the tabs after an event that went past the queue, whose answer tells nobody that `shown` changed."""
    event.then(
        lambda shown: Shown(shown.comparison, shown.recorded) if shown.recorded else gr.skip(),
        inputs=[page.shown],
        outputs=[page.shown],
        **PRIVATE,
    )


def values(page: Page, comparison: Comparison, asker: Any, *, imported: bool = False) -> list[Any]:
    """A saved comparison as the page shows it."""
    slots = len(page.cards)
    live = Live.of(comparison, recorded=True)
    drawn = [cards.render(live, column, number) for number, column in enumerate(live.columns)]
    # One made elsewhere may have more columns than this page has places: the last place takes the rest.
    shown = [*drawn[: slots - 1], "".join(drawn[slots - 1 :])]
    shown += [""] * (slots - len(shown))
    link = share.render(page, comparison, asker, saved=True)
    return [
        *shown, summary.render(live), notice.say(""), banner(comparison, imported), link, Shown(comparison, True)
    ]  # fmt: skip


def refusal(page: Page, problem: Problem, *, keep: bool = False) -> list[Any]:
    """Why nothing was opened, and a way on. With `keep`, what the page showed before stays."""
    if keep:
        return [
            *[gr.skip()] * (len(page.cards) + 1),
            notice.problem(problem),
            gr.skip(),
            gr.skip(),
            gr.skip(),
        ]
    return [
        *[""] * len(page.cards), "", notice.say(""), not_here(problem), "", Shown()
    ]  # fmt: skip


def nothing(page: Page) -> list[Any]:
    return [gr.skip()] * len(outputs(page))


def banner(comparison: Comparison, imported: bool = False) -> str:
    """The line above a recording: that it is one, when and on what it was measured, and how to repeat it."""
    environment = comparison.environment
    unlike = devices.unlike(comparison.cells)
    where = "unlike devices" if unlike else environment.device or "a machine that did not say what it is"
    if environment.cpu and not (environment.device or "").startswith("CPU"):
        where += f", {environment.cpu}"
    elif environment.cpu:
        where += f" ({environment.cpu})"
    facts = [
        ("Model", code(comparison.model)),
        ("Driver", esc(environment.driver) if environment.driver else ""),
        ("Memory", esc(f"{environment.memory_bytes / 1e9:,.1f} GB") if environment.memory_bytes else ""),
        ("Python", esc(environment.python) if environment.python else ""),
        *((esc(name), esc(version)) for name, version in sorted(environment.packages.items())),
        ("Settings", esc(settings_words(comparison))),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts if value)
    source = " It came as a file, so its figures are as true as whoever sent it." if imported else ""
    asked = _prompt(comparison)
    return (
        '<section class="recording" aria-label="Recording"><div class="recording-head">'
        f'<p role="status"><b>Recording</b> · measured {esc(when(comparison.created_at))} on {esc(where)}.{source}</p>'
        '<button type="button" class="again" data-again>Run this here</button></div>'
        f"{asked}<details><summary>Environment and settings</summary><dl>{listed}</dl></details></section>"
    )


def _prompt(comparison: Comparison) -> str:
    prompt = comparison.prompt
    system = (
        f'<p class="recording-system"><b>System prompt</b> {esc(prompt.system)}</p>' if prompt.system else ""
    )
    tokens = f" ({words.plural(prompt.token_count, 'token')})" if prompt.token_count is not None else ""
    return (
        f'{system}<p class="recording-label">Prompt{esc(tokens)}</p><blockquote dir="auto" tabindex="0" '
        f'aria-label="Prompt of the recording">{esc(prompt.text)}</blockquote>'
    )


def settings_words(comparison: Comparison) -> str:
    s = comparison.settings
    parts = [
        f"{s.max_new_tokens:,} new tokens at most",
        "greedy"
        if s.temperature == 0
        else f"temperature {s.temperature:g}, top-p {s.top_p:g}, top-k {s.top_k}",
        f"repetition penalty {s.repetition_penalty:g}" if s.repetition_penalty != 1 else "",
        f"seed {s.seed}",
        words.plural(s.repeats, "run"),
        f"decode {s.decode}",
        "chat template" if comparison.prompt.chat else "raw text",
    ]
    return ", ".join(p for p in parts if p)


def not_here(problem: Problem) -> str:
    """The page of a link that opens nothing: what, why, and three ways on."""
    return (
        '<section class="recording missing" role="alert"><h2>This link opens nothing here</h2>'
        f"<p><b>{esc(problem.problem)}</b></p><p>{esc(problem.advice)}</p>"
        '<p class="ways"><a class="again" href="?" data-fresh>Start a new comparison</a>'
        '<button type="button" class="quiet" data-history>Look through the history</button></p></section>'
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
