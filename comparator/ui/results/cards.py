"""One card per column: the answer, its key figures compared with the reference, and buttons."""

from __future__ import annotations

import gradio as gr

from comparator.core import devices
from comparator.core.errors import UserError
from comparator.core.result import CellResult
from comparator.fidelity import verdict
from comparator.metrics.definitions import METRICS
from comparator.ui.markup import code, esc
from comparator.ui.page import Page, html
from comparator.ui.results import error_details
from comparator.ui.text_diff import changed_words, differences
from comparator.ui.view_state import Column, Live
from comparator.util import formatting

INTRO = (
    '<div class="intro"><p><b>Quantizing makes a model smaller.</b> This page shows what else it changes: the answers, '
    "the speed, the memory, and every layer.</p>"
    "<p><b>Every selected variant answers the same prompt</b>, one after another. All figures are measured in this run, on "
    "this machine.</p>"
    "<p><b>An example is already filled in.</b> Press Run.</p></div>"
)


# Shown from five columns on; what its buttons and the keys do is in columns.js.
BAR = (
    '<div class="columns-bar"><span class="hint">The columns scroll sideways.<span class="keys"> Keys in a column: '
    "<kbd>←</kbd> <kbd>→</kbd> <kbd>Home</kbd> <kbd>End</kbd> go to another, <kbd>Alt</kbd> with <kbd>←</kbd> or "
    '<kbd>→</kbd> moves it.</span></span><button type="button" class="quiet" data-expand>Expand all</button>'
    '<button type="button" class="quiet" data-reset>Reset columns</button><span role="status"></span></div>'
)


def build(page: Page) -> None:
    html(BAR, elem_id="columns-bar", js_on_load="qc.columns(element.querySelector('.columns-bar'))")
    with gr.Column(elem_id="cards", elem_classes="cards"):
        for number in range(page.settings.max_columns):
            page.cards.append(
                html(
                    INTRO if number == 0 else "",
                    elem_classes="slot",
                    js_on_load="qc.card(element, trigger, 'release')",
                )
            )


def render(live: Live, column: Column, number: int, unloaded: dict[str, int] | None = None) -> str:
    """The card of one column as HTML."""
    colour = live.colours[column.variant]
    back, saved = (unloaded or {}).get(column.label), " saved" if live.recorded else ""
    body = _problem(live, column) if column.state == "failed" else _answer(live, column)
    return (
        f'<article class="card {esc(column.state)}{saved}" style="--c:{esc(colour)}" aria-label="{esc(column.label)}">'
        f"{_head(live, column)}{body}{_figures(live, column)}{_notes(column)}{_actions(live, column, number, back)}"
        "</article>"
    )


def _head(live: Live, column: Column) -> str:
    tag = '<span class="tag">reference</span>' if live.is_reference(column) else ""
    width = 100 if column.finished or column.state == "answered" else round(100 * (column.fraction or 0))
    waiting = column.state in ("loading", "scoring") and column.fraction is None
    moving = " moving" if waiting or column.state == "generating" else ""
    return (
        f'<header><span class="swatch" aria-hidden="true"></span><h3>{code(column.label)}</h3>{tag}'
        f'<span class="state">{esc(state_words(column))}</span></header>'
        f'<div class="progress{moving}" aria-hidden="true"><i style="width:{width}%"></i></div>'
    )


def state_words(column: Column) -> str:
    """queued, loading 40 %, generating, answered, scoring 40 %, done, stopped, failed."""
    if column.state in ("loading", "scoring") and column.fraction is not None:
        return f"{column.state} {column.fraction * 100:.0f} %"
    if column.state == "generating" and column.answered:
        return column.message  # "run 2 of 3"
    return column.state


def step_words(column: Column) -> str:
    """What a column does, how much of it is done and how long the rest takes: "loading weights · 62 % · 3 s left"."""
    share = f"{column.fraction * 100:.0f} %" if column.fraction is not None else ""
    left = f"{formatting.duration(column.left_s)} left" if column.left_s is not None else ""
    return " · ".join(filter(None, (column.message.strip().rstrip(".…"), share, left)))


def _answer(live: Live, column: Column) -> str:
    if not column.text:
        waiting = {
            "queued": "Queued",
            "loading": _sentence(step_words(column)) or "Loading weights …",
            "generating": "Processing the prompt …",
            "answered": "Empty answer: the model ended immediately.",
            "scoring": _sentence(step_words(column)) or "Scoring …",
            "stopped": "Stopped before it started.",
            "done": "Empty answer: the model ended immediately.",
        }[column.state]
        inner = f'<p class="empty">{esc(waiting)}</p>'
    else:
        inner = f'<div class="text" dir="auto">{_marked(live, column)}</div>'
    return (
        f'<div class="answer" tabindex="0" role="region" aria-label="Answer of {esc(column.label)}">{inner}</div>'
        f'<p class="length" title="{esc(length_words(column))}">{esc(length_words(column))}</p>'
    )


def _sentence(message: str) -> str:
    text = message.strip().rstrip(".…")
    return text[:1].upper() + text[1:] + " …" if text else ""


def length_words(column: Column) -> str:
    """How long the answer is, and why it ended: "64 tokens (limit reached)"."""
    if not column.tokens:
        return "–"
    reason = column.result.finish_reason if column.result else None
    ended = {"eos": "(complete)", "length": "(limit reached)", "stopped": "(stopped)"}.get(
        reason or "", "so far"
    )
    text = f"{formatting.plural(column.tokens, 'token')} {ended}"
    if column.state == "scoring" and column.message:
        text += f" · {step_words(column)}"
    return text


def _marked(live: Live, column: Column) -> str:
    """The answer, thinking apart; its differences from the reference's are marked once both are complete (a check box
    shows them)."""
    thought, answer = parts(column)
    opened = column.result.thinking.opened if column.result and column.result.thinking else ""
    html = (
        f'<span class="thinking" title="thinking">{esc(opened)}{esc(thought)}</span>'
        if opened or thought
        else ""
    )
    reference = live.against(column)
    theirs = parts(reference)[1] if reference else ""
    if reference is None or not (column.answered and reference.answered and theirs):
        return html + esc(answer)
    pieces = []
    for piece in differences(answer, theirs):
        if piece.kind == "same":
            pieces.append(esc(piece.text))
        elif piece.kind == "changed":
            tooltip = f"reference: {piece.other}" if piece.other else "not in the reference"
            pieces.append(f'<span class="diff" title="{esc(tooltip)}">{esc(piece.text)}</span>')
        else:
            pieces.append(f'<span class="gap" title="{esc(f"only in the reference: {piece.other}")}"></span>')
    return html + "".join(pieces)


def parts(column: Column) -> tuple[str, str]:
    """(thinking, answer proper) of a column's text."""
    end = column.result.thinking.characters if column.result and column.result.thinking else 0
    return column.text[:end], column.text[end:]


def differing(live: Live, column: Column) -> str:
    """Short comparison with the reference's answer; "" while either is missing."""
    reference = live.against(column)
    if reference is None or not (column.answered and reference.answered and column.text and reference.text):
        return ""
    if column.text == reference.text:
        return "same text"
    changed, total = changed_words(differences(column.text, reference.text))
    return f"{changed} of {formatting.plural(total, 'word')} differ" if changed else "some words missing"


def _problem(live: Live, column: Column) -> str:
    error = column.result.error if column.result else None
    problem = error.problem if error else "It failed without an error message."
    advice = error.advice if error else ""
    error_id = error.error_id if error else None
    buttons = "" if live.recorded else (
        f'<button type="button" class="quiet" data-untick="{esc(column.variant)}">Remove variant</button>'
        '<button type="button" class="quiet" data-run>Run again</button>'
    )  # fmt: skip
    return (
        f'<div class="answer problem" role="region" tabindex="0" aria-label="Why {esc(column.label)} failed">'
        f"<p><b>{code(column.label)} could not run.</b></p><p>{esc(problem)}</p><p>{esc(advice)}</p>"
        f"{error_details.where(error_id)}</div>"
        f'<div class="length">{buttons}{error_details.copy_button(error_id, column.label)}</div>'
    )


def _figures(live: Live, column: Column) -> str:
    result, reference = column.result, live.against(column)
    other = reference.result if reference else None
    speed, first, memory = (
        (result.latency.decode_tok_s, result.latency.ttft_s, result.memory.resident_bytes)
        if result
        else (None, None, None)
    )
    if speed is None and column.speed_so_far:
        rate = (formatting.figure(column.speed_so_far, "tok/s"), "so far")
    else:
        rate = (formatting.figure(speed, "tok/s"), _speed_beside(result, other, "decode_tok_s"))
    share = formatting.ratio(memory, other.memory.resident_bytes) if other else None
    rows = (
        ("Speed", "tokens per second after the first", *rate),
        (
            "First token",
            "time to first token (TTFT)",
            formatting.seconds(first),
            _speed_beside(result, other, "ttft_s"),
        ),
        (
            "Memory",
            "memory this variant uses on its device after the warm-up",
            formatting.megabytes(memory),
            esc(formatting.amount(share)),
        ),
    )
    return f'<dl class="figures">{"".join(_figure(*row) for row in rows)}</dl>'


def _speed_beside(result: CellResult | None, reference: CellResult | None, key: str) -> str:
    """How a time or rate compares with the reference's: in words where the runs carry it, else the ratio in grey."""
    mark = devices.mark(result, reference)
    if words := verdict.speed_words(result, reference, key):
        return esc(words + mark)
    metric = METRICS[key]
    share = formatting.ratio(metric.get(result), metric.get(reference)) if result and reference else None
    return "" if share is None else f'<span class="grey">{esc(formatting.times(share, mark))}</span>'


def _figure(name: str, why: str, value: str, beside: str) -> str:
    kind = ' class="none"' if value == formatting.NONE else ""
    return f'<div><dt title="{esc(why)}">{esc(name)}</dt><dd{kind}>{esc(value)}</dd><dd class="versus">{beside}</dd></div>'


def _notes(column: Column) -> str:
    notes = column.result.notes if column.result else ()
    if not notes:
        return '<div class="notes none"></div>'
    items = "".join(f"<li>{esc(note)}</li>" for note in notes)
    return (
        f'<details class="notes"><summary title="{esc(notes[0])}"><b>{formatting.plural(len(notes), "note")}</b> {esc(notes[0])}</summary>'
        f"<ul>{items}</ul></details>"
    )


def _actions(live: Live, column: Column, number: int, back: int | None) -> str:
    copy = f'<button type="button" class="quiet" data-copy-answer{"" if column.text else " disabled"}>Copy text</button>'
    source = _source(live, column)
    use = '<button type="button" class="quiet" disabled>Show code</button>'
    if source:
        use = (
            '<button type="button" class="quiet" data-sheet>Show code</button>'
            f'<dialog class="sheet" aria-label="Code for {esc(column.label)}"><header><h3>{code(column.label)} '
            'with transformers</h3><button type="button" class="quiet" data-copy-code>Copy</button>'
            '<button type="button" class="quiet" data-close>Close</button></header>'
            f'<pre tabindex="0"><code>{esc(source)}</code></pre></dialog>'
        )
    if live.recorded:
        unload = ""
    elif back is not None:
        unload = f'<span class="done-note">{esc(formatting.megabytes(back))} freed</span>'
    else:
        # Not while the comparison runs: repeats and scoring still need the variant.
        memory = column.result.memory if column.result and live.comparison else None
        is_resident = memory is not None and memory.resident_bytes is not None
        unload = (
            f'<button type="button" class="quiet" data-release="{number}"{"" if is_resident else " disabled"} '
            f'aria-label="Unload {esc(column.label)}">Unload</button>'
        )
    return f'<footer class="actions">{copy}{use}{unload}</footer>'


def _source(live: Live, column: Column) -> str | None:
    """Code that reproduces the column; None until the comparison is complete and the column has succeeded."""
    if live.comparison is None or column.result is None or column.state != "done":
        return None
    from comparator.reporting.snippet import snippet

    try:
        return snippet(column.result, live.comparison)
    except UserError:  # a document from elsewhere, with a method that is not known here
        return None
