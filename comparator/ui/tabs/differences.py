"""The Differences tab: each answer aligned word by word with the reference's, and why they part where they do."""

from __future__ import annotations

import gradio as gr

from comparator.core.result import CellResult, Comparison
from comparator.fidelity.verdict import reference_of
from comparator.reporting.plots import style
from comparator.ui.form import Shown
from comparator.ui.markup import code, esc, note, render, swatch
from comparator.ui.page import Page, html
from comparator.ui.parting import Candidate, Parting, parting
from comparator.ui.results.side_by_side import LONGEST
from comparator.ui.results.token_view import percent, visible
from comparator.ui.text_diff import differences
from comparator.util import formatting

EMPTY = "Select two variants and press Run. Once both have answered, this tab shows their answers aligned word by word."
HOW = (
    "Unmarked text is the same in both. Where there are two lines, the upper one is the reference's and the lower one the "
    "variant's. The first difference is framed: hover over it, or reach it with Tab, for the probabilities of both tokens."
)
NOT_LISTED = "not in its top five"


def build(page: Page) -> None:
    with gr.Tab("Differences", id="differences"):
        view = html(note(EMPTY), elem_id="differences-view")
        page.on_comparison(show, [view], running=True)


def show(shown: Shown):
    return note(EMPTY) if shown.comparison is None else view_of(shown.comparison)


def view_of(comparison: Comparison) -> str:
    """A section per column that has answered beside its reference, as HTML."""
    colours = style.comparison_colours(comparison)
    sections = [
        _section(cell, reference, colours[cell.variant])
        for cell in comparison.cells
        if cell.status == "ok" and (reference := reference_of(comparison, cell)) and reference is not cell
    ]
    return note(esc(HOW)) + "".join(sections) if sections else note(EMPTY)


def _section(cell: CellResult, reference: CellResult, colour: str) -> str:
    place = parting(cell, reference)
    heading = f"<h3>{swatch(colour)}{code(cell.label)} against {code(reference.label)}</h3>"
    body = note(esc(in_words(cell, reference, place)))
    if place is not None and max(len(cell.text), len(reference.text)) <= LONGEST:
        body += render(
            "differences.html", pieces=differences(cell.text, reference.text), place=place, label=cell.label,
            reference=reference.label, colour=colour, percent=lambda p: _percent(p), visible=visible,
        )  # fmt: skip
    scored = cell.fidelity and cell.fidelity.prompt and cell.fidelity.prompt.kl
    more = '<p><button type="button" class="quiet" data-tab="Fidelity">Every token tinted by KL divergence</button></p>'
    return f"<section>{heading}{body}{more if scored else ''}</section>"


def in_words(cell: CellResult, reference: CellResult, place: Parting | None) -> str:
    """Where the answers part and how close the decision was, as a sentence."""
    if place is None:
        return f"The same {formatting.plural(len(cell.token_ids), 'token')} as {reference.label}."
    start = f"The answers diverge at token {place.position + 1}."
    if place.position == 0:
        start = "The answers differ from the first token on."
    if place.position >= min(len(cell.token_ids), len(reference.token_ids)):
        shorter, longer = sorted((cell, reference), key=lambda c: len(c.token_ids))
        return (
            f"The same up to token {place.position}, where {shorter.label} ends and {longer.label} continues."
        )
    parts = [
        _choice(candidate, name, own, other, theirs)
        for candidate, name, own, other, theirs in (
            (place.reference, reference.label, _of(place.reference, True), cell.label, _of(place.reference, False)),
            (place.column, cell.label, _of(place.column, False), reference.label, _of(place.column, True)),
        )
        if candidate is not None
    ]  # fmt: skip
    return f"{start} There {', and '.join(parts)}." if parts else start


def _choice(candidate: Candidate, name: str, own: float | None, other: str, theirs: float | None) -> str:
    return f"{name} chose {visible(candidate.token)} ({_percent(own)}; {other}: {_percent(theirs)})"


def _of(candidate: Candidate | None, in_reference: bool) -> float | None:
    if candidate is None:
        return None
    return candidate.reference_p if in_reference else candidate.p


def _percent(p: float | None) -> str:
    return NOT_LISTED if p is None else percent(p)
