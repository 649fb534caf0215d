"""The columns: one card each, with the answer, its key figures beside the reference's, and what to do with it."""

from __future__ import annotations

import gradio as gr

from comparator import devices, words
from comparator.types import Problem
from comparator.ui.differences import changed_words, differences
from comparator.ui.live import Column, Live
from comparator.ui.markup import code, esc
from comparator.ui.page import Page

INTRO = (
    '<div class="intro"><p><b>Quantizing makes a model smaller.</b> This page shows what else it changes: the answer, '
    "the speed, the bytes, layer by layer.</p>"
    "<p><b>Every variant you tick answers the same prompt</b>, one after another, and every figure is measured here, in "
    "this run.</p>"
    "<p><b>An example is filled in.</b> Press Run.</p></div>"
)


def build(page: Page) -> None:
    with gr.Column(elem_id="cards", elem_classes="cards"):
        for number in range(page.settings.max_columns):
            page.cards.append(
                gr.HTML(
                    INTRO if number == 0 else "",
                    elem_classes="slot",
                    apply_default_css=False,
                    js_on_load="qc.card(element, trigger, 'release')",
                )
            )


def render(live: Live, column: Column, number: int, unloaded: dict[str, int] | None = None) -> str:
    """The card of one column as HTML."""
    colour = live.colours[column.variant]
    back = (unloaded or {}).get(column.label)
    body = _problem(live, column) if column.state == "failed" else _answer(live, column)
    return (
        f'<article class="card {esc(column.state)}" style="--c:{esc(colour)}" aria-label="{esc(column.label)}">'
        f"{_head(live, column)}{body}{_figures(live, column)}{_notes(column)}{_actions(live, column, number, back)}"
        "</article>"
    )


def _head(live: Live, column: Column) -> str:
    tag = '<span class="tag">reference</span>' if live.is_reference(column) else ""
    width = 100 if column.finished else round(100 * (column.fraction or 0))
    waiting = column.state in ("loading", "scoring") and column.fraction is None
    moving = " moving" if waiting or column.state == "generating" else ""
    return (
        f'<header><span class="swatch" aria-hidden="true"></span><h3>{code(column.label)}</h3>{tag}'
        f'<span class="state">{esc(state_words(column))}</span></header>'
        f'<div class="progress{moving}" aria-hidden="true"><i style="width:{width}%"></i></div>'
    )


def state_words(column: Column) -> str:
    """queued, loading 40 %, generating, done, stopped, failed."""
    if column.state in ("loading", "scoring") and column.fraction is not None:
        return f"{column.state} {column.fraction * 100:.0f} %"
    return column.state


def _answer(live: Live, column: Column) -> str:
    if not column.text:
        waiting = {
            "queued": "Waits for its turn.",
            "loading": _sentence(column.message) or "Loading the weights.",
            "generating": "Reading the prompt.",
            "scoring": _sentence(column.message) or "Scoring.",
            "stopped": "Stopped before it began.",
            "done": "The answer is empty: the model ended at once.",
        }[column.state]
        inner = f'<p class="empty">{esc(waiting)}</p>'
    else:
        inner = f'<div class="text" dir="auto">{_marked(live, column)}</div>'
    return (
        f'<div class="answer" tabindex="0" role="region" aria-label="Answer of {esc(column.label)}">{inner}</div>'
        f'<p class="length">{esc(length_words(column))}</p>'
    )


def _sentence(message: str) -> str:
    text = message.strip().rstrip(".…")
    return text[:1].upper() + text[1:] + " …" if text else ""


def length_words(column: Column) -> str:
    """How long the answer is, and why it ended."""
    if not column.tokens:
        return "–"
    reason = column.result.finish_reason if column.result else None
    ended = {"eos": "complete", "length": "cut at the limit", "stopped": "stopped"}.get(
        reason or "", "so far"
    )
    text = f"{words.plural(column.tokens, 'token')}, {ended}"
    if column.state == "scoring" and column.message:
        text += f" · {column.message}"
    elif column.state == "generating" and column.message:
        text += f" · {column.message}"
    return text


def _marked(live: Live, column: Column) -> str:
    """The answer; once it and the reference's are there, with its differences marked (shown by a switch)."""
    reference = live.against(column)
    if reference is None or not (column.answered and reference.answered and reference.text):
        return esc(column.text)
    parts = []
    for piece in differences(column.text, reference.text):
        if piece.kind == "same":
            parts.append(esc(piece.text))
        elif piece.kind == "changed":
            said = f"reference: {piece.other}" if piece.other else "not in the reference"
            parts.append(f'<span class="diff" title="{esc(said)}">{esc(piece.text)}</span>')
        else:
            parts.append(f'<span class="gap" title="{esc(f"only in the reference: {piece.other}")}"></span>')
    return "".join(parts)


def differing(live: Live, column: Column) -> str:
    """The two answers compared in a few words; nothing while either is missing."""
    reference = live.against(column)
    if reference is None or not (column.answered and reference.answered and column.text and reference.text):
        return ""
    if column.text == reference.text:
        return "same text"
    changed, total = changed_words(differences(column.text, reference.text))
    return (
        f"{changed} of {words.plural(total, 'word')} differ" if changed else "same words, but not all of them"
    )


def _problem(live: Live, column: Column) -> str:
    error = column.result.error if column.result else None
    problem = error.problem if error else "It failed without saying why."
    advice = error.advice if error else ""
    buttons = "" if live.recorded else (
        f'<button type="button" class="quiet" data-untick="{esc(column.variant)}">Remove column</button>'
        '<button type="button" class="quiet" data-run>Run again</button>'
    )  # fmt: skip
    return (
        f'<div class="answer problem" role="region" tabindex="0" aria-label="Why {esc(column.label)} failed">'
        f"<p><b>{code(column.label)} could not run.</b></p><p>{esc(problem)}</p><p>{esc(advice)}</p></div>"
        f'<p class="length">{buttons}</p>'
    )


def _figures(live: Live, column: Column) -> str:
    mine, reference = column.result, live.against(column)
    theirs = reference.result if reference else None
    speed, first, memory = (
        (mine.latency.decode_tok_s, mine.latency.ttft_s, mine.memory.resident_bytes)
        if mine
        else (None, None, None)
    )
    other = (
        (theirs.latency.decode_tok_s, theirs.latency.ttft_s, theirs.memory.resident_bytes)
        if theirs
        else (None, None, None)
    )
    mark = devices.mark(mine, theirs)
    if speed is None and column.speed_so_far:
        rate = (words.figure(column.speed_so_far, "tok/s"), "so far")
    else:
        share = words.ratio(speed, other[0])
        rate = (words.figure(speed, "tok/s"), _beside(share, speed_word(mine, theirs), mark))
    first_share, memory_share = words.ratio(first, other[1]), words.ratio(memory, other[2])
    rows = (
        ("Speed", "tokens a second after the first", *rate),
        (
            "First token",
            "time from the prompt to the first token (TTFT)",
            words.seconds(first),
            _beside(first_share, words.judged(first_share, "sooner", "later"), mark),
        ),
        (
            "Memory",
            "what this variant holds on its device after the warm-up",
            words.megabytes(memory),
            _beside(memory_share, words.judged(memory_share, "smaller", "larger"), mark),
        ),
    )
    return f'<dl class="figures">{"".join(_figure(*row) for row in rows)}</dl>'


def _figure(name: str, why: str, value: str, beside: str) -> str:
    kind = ' class="none"' if value == words.NONE else ""
    return f'<div><dt title="{esc(why)}">{esc(name)}</dt><dd{kind}>{esc(value)}</dd><dd class="versus">{beside}</dd></div>'


def speed_word(mine, theirs) -> str:
    """faster, slower, same, can't tell; nothing without both."""
    if not mine or not theirs:
        return ""
    return words.speed_verdict(
        [r.decode_tok_s for r in mine.latency.runs if r.decode_tok_s],
        [r.decode_tok_s for r in theirs.latency.runs if r.decode_tok_s],
    )


def _beside(share: float | None, word: str, mark: str = "") -> str:
    return (
        f'<span class="times">{esc(words.times(share, mark))}</span> {esc(word)}'.strip()
        if share is not None
        else ""
    )


def _notes(column: Column) -> str:
    notes = column.result.notes if column.result else ()
    if not notes:
        return '<div class="notes none"></div>'
    items = "".join(f"<li>{esc(note)}</li>" for note in notes)
    return (
        f'<details class="notes"><summary>{words.plural(len(notes), "thing")} to know</summary>'
        f"<ul>{items}</ul></details>"
    )


def _actions(live: Live, column: Column, number: int, back: int | None) -> str:
    copy = f'<button type="button" class="quiet" data-copy-answer{"" if column.text else " disabled"}>Copy text</button>'
    source = _source(live, column)
    use = '<button type="button" class="quiet" disabled>Use this column</button>'
    if source:
        use = (
            '<button type="button" class="quiet" data-sheet>Use this column</button>'
            f'<dialog class="sheet" aria-label="Code for {esc(column.label)}"><header><h3>{code(column.label)} '
            'in your own code</h3><button type="button" class="quiet" data-copy-code>Copy</button>'
            '<button type="button" class="quiet" data-close>Close</button></header>'
            f'<pre tabindex="0"><code>{esc(source)}</code></pre></dialog>'
        )
    if live.recorded:
        unload = ""
    elif back is not None:
        unload = f'<span class="done-note">{esc(words.megabytes(back))} came back</span>'
    else:
        # Not while the comparison runs: its columns are still needed, for other rounds and for scoring.
        memory = column.result.memory if column.result and live.comparison else None
        held = memory is not None and memory.resident_bytes is not None
        unload = (
            f'<button type="button" class="quiet" data-release="{number}"{"" if held else " disabled"} '
            f'aria-label="Unload {esc(column.label)}">Unload</button>'
        )
    return f'<footer class="actions">{copy}{use}{unload}</footer>'


def _source(live: Live, column: Column) -> str | None:
    """The code that reproduces the column, once the comparison is complete and the column came out well."""
    if live.comparison is None or column.result is None or column.state != "done":
        return None
    from comparator.code import snippet

    try:
        return snippet(column.result, live.comparison)
    except Problem:  # a column of someone else's document, made by a method that is not known here
        return None
