"""The verdict table: every column's size, speed and fidelity on one line, each beside the reference's."""

from __future__ import annotations

import gradio as gr

from comparator import devices, figures, words
from comparator.types import CellResult
from comparator.ui.components.cards import differing, speed_word
from comparator.ui.live import Column, Live
from comparator.ui.markup import bar, code, compared, esc, swatch
from comparator.ui.page import Page

HEADS = (
    ("Column", ""),
    ("Memory, MB", "what the variant holds on its device after the warm-up; MB are 10^6 bytes"),
    (
        "Speed, tok/s",
        "tokens a second, from the first new token to the last; the median where there are repeats",
    ),
    ("First token", "time from the prompt's tokens to the first new token (TTFT)"),
    ("KL, nats", "mean KL divergence from the reference over the reference's answer; 0 is identical"),
    ("Agrees, %", "how often this column's own first choice is the reference's token"),
    ("In words", "against the reference"),
)


def build(page: Page) -> None:
    page.summary = gr.HTML("", elem_id="summary", apply_default_css=False)


def render(live: Live) -> str:
    """The table as HTML; before a figure is there its place is kept by a dash."""
    if not live.columns:
        return ""
    most_memory = max((_memory(c.result) or 0 for c in live.columns), default=0)
    most_speed = max((_speed(c) or 0 for c in live.columns), default=0)
    heads = "".join(f'<th scope="col" title="{esc(why)}">{esc(title)}</th>' for title, why in HEADS)
    rows = "".join(_row(live, column, most_memory, most_speed) for column in live.columns)
    unlike = devices.unlike(c.result for c in live.columns if c.result)
    return (
        (f'<p class="unlike" role="note">{esc(unlike)}</p>' if unlike else "")
        + '<div class="scroll" tabindex="0" role="region" aria-label="All columns at a glance">'
        f'<table class="verdict"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="foot">{esc(footnote(live))}</p>'
    )


def footnote(live: Live) -> str:
    """The units, what × means, and how far a difference in speed can be trusted."""
    name = live.reference_column
    text = "MB are 10⁶ bytes. "
    if name is not None and len(live.columns) > 1:
        text += f"× is the ratio to {name.label}, the reference. "
    if live.repeats > 1:
        return (
            text + f"Medians of {live.repeats} runs; where their ranges overlap, the page says “can't tell”."
        )
    return text + "One run each: set Repeats under More settings to see which differences in speed hold."


def _row(live: Live, column: Column, most_memory: float, most_speed: float) -> str:
    colour = live.colours[column.variant]
    reference = live.against(column)
    theirs = reference.result if reference else None
    memory, speed = _memory(column.result), _speed(column)
    first = column.result.latency.ttft_s if column.result else None
    mark = devices.mark(column.result, theirs)
    cells = (
        bar(memory / most_memory if memory and most_memory else None, colour)
        + compared(words.megabytes(memory, unit=False), words.ratio(memory, _memory(theirs)), mark=mark),
        bar(speed / most_speed if speed and most_speed else None, colour)
        + compared(
            words.figure(speed),
            words.ratio(speed, theirs.latency.decode_tok_s if theirs else None),
            mark=mark,
        ),
        compared(
            words.seconds(first), words.ratio(first, theirs.latency.ttft_s if theirs else None), mark=mark
        ),
        esc(_written("prompt_kl_mean", column.result)),
        esc(_written("prompt_agreement", column.result)),
    )
    classes = ("barred", "barred", "n", "n", "n")
    written = "".join(f'<td class="{kind}">{cell}</td>' for kind, cell in zip(classes, cells, strict=True))
    return (
        f'<tr><th scope="row">{swatch(colour)}{code(column.label)}</th>{written}'
        f'<td class="words">{esc(in_words(live, column))}</td></tr>'
    )


def _written(key: str, result: CellResult | None) -> str:
    return figures.BY_KEY[key].written(result) if result else words.NONE


def _memory(result: CellResult | None) -> int | None:
    return result.memory.resident_bytes if result else None


def _speed(column: Column) -> float | None:
    return column.result.latency.decode_tok_s if column.result else None


def in_words(live: Live, column: Column) -> str:
    """The row said as a person would: "smaller, slower, 12 of 40 words differ"."""
    if column.state == "failed":
        return "failed"
    if live.is_reference(column):
        return "reference" if column.answered else column.state
    if not column.answered or not column.result:
        return column.state
    reference = live.against(column)
    theirs = reference.result if reference else None
    share = words.ratio(_memory(column.result), _memory(theirs))
    size = words.judged(share, "smaller", "larger").replace("same", "same size")
    speed = speed_word(column.result, theirs)
    speed = {"same": "same speed", "can't tell": "speed: can't tell"}.get(speed, speed)
    said = [p for p in (size, speed, differing(live, column)) if p]
    return ", ".join(said) or column.state
