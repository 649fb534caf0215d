"""Comparisons of one prompt side by side: from another machine, another version, another day.

A table with one row per column of each comparison, grouped by variant; below it the answers.
"""

from __future__ import annotations

from collections.abc import Sequence

from comparator import backends
from comparator.core.result import CellResult, Comparison
from comparator.metrics.definitions import METRICS
from comparator.reporting.plots import style
from comparator.ui.markup import code, compared, esc, note, swatch, table
from comparator.ui.results.saved_comparison import when
from comparator.ui.text_diff import changed_words, differences
from comparator.util import formatting

HEADS = (
    ("Variant", ""),
    ("Comparison", "its number in the list above the table"),
    (
        "Memory, MB",
        "memory of the variant on its device after the warm-up; × is the ratio to the first row of its group",
    ),
    ("Speed, tok/s", "tokens per second after the first; the median of the repeats"),
    ("First token, ms", "time to first token (TTFT)"),
    ("KL, nats", "mean KL divergence from that comparison's own reference"),
    ("Answer", "the text compared with the first of its group"),
)
PACKAGES = (*backends.packages(), "peft")
LONGEST = 20_000  # answers with more characters are not compared word by word


def render(comparisons: Sequence[Comparison]) -> str:
    """Two or more comparisons of the same prompt as HTML."""
    labels = list(dict.fromkeys(cell.label for c in comparisons for cell in c.cells))
    named = style.colours(labels, None)
    rows, answers = [], []
    for label in labels:
        group = [
            (n, c, cell) for n, c in enumerate(comparisons, 1) for cell in c.cells if cell.label == label
        ]
        first = group[0][2]
        for number, _, cell in group:
            rows.append(_row(cell, first, number, named[label]))
        answers.append(_answers(label, group, named[label]))
    prompt = comparisons[0].prompt
    return (
        "<h3>Side by side</h3>"
        f'<p class="recording-label">Prompt</p><blockquote dir="auto">{esc(prompt.text)}</blockquote>'
        f'<ol class="beside-list">{"".join(_machine(c) for c in comparisons)}</ol>'
        f"{_unlike(comparisons)}"
        f"{table(HEADS, rows, caption='By variant, then by comparison', numeric=range(2, 6), name='beside')}"
        f'<div class="beside">{"".join(answers)}</div>'
    )


def _machine(comparison: Comparison) -> str:
    environment = comparison.environment
    versions = ", ".join(f"{n} {environment.packages[n]}" for n in PACKAGES if n in environment.packages)
    device = environment.device or "unknown device"
    cpu = f", {environment.cpu}" if environment.cpu and environment.cpu != device else ""
    return (
        f'<li><a href="?c={esc(comparison.id)}" target="_blank" rel="noopener">{esc(device)}{esc(cpu)}</a> · '
        f"{esc(when(comparison.created_at))} · {esc(versions)}</li>"
    )


def _unlike(comparisons: Sequence[Comparison]) -> str:
    """Note on differences between the requests, which also change the figures; "" without any."""
    different = []
    if len({c.model for c in comparisons}) > 1:
        different.append("the models")
    if len({c.prompt.chat for c in comparisons}) > 1:
        different.append("the chat template")
    if len({c.settings for c in comparisons}) > 1:
        different.append("the settings")
    if not different:
        return ""
    return note(
        f"Different requests: {esc(formatting.join(different))} differ, which also changes figures and answers."
    )


def _row(cell: CellResult, first: CellResult, number: int, colour: str) -> list[str]:
    def beside(value, other, shown):
        share = None if cell is first else formatting.ratio(value, other)
        return compared(shown, share, key=value)

    memory, speed, ttft = cell.memory.resident_bytes, cell.latency.decode_tok_s, cell.latency.ttft_s
    return [
        swatch(colour) + code(cell.label),
        str(number),
        beside(memory, first.memory.resident_bytes, formatting.megabytes(memory, unit=False)),
        beside(speed, first.latency.decode_tok_s, formatting.figure(speed)),
        beside(ttft, first.latency.ttft_s, formatting.figure(None if ttft is None else ttft * 1e3)),
        esc(METRICS["prompt_kl_mean"].format(cell)),
        esc(_answer_cell(cell, first)),
    ]


def _answer_cell(cell: CellResult, first: CellResult) -> str:
    if cell.status == "failed":
        return "failed"
    if cell is first:
        return formatting.plural(len(cell.token_ids), "token")
    if cell.text == first.text:
        return "same text"
    if max(len(cell.text), len(first.text)) > LONGEST:
        return "different text"
    changed, total = changed_words(differences(cell.text, first.text))
    return f"{changed} of {formatting.plural(total, 'word')} differ"


def _answers(label: str, group: list[tuple[int, Comparison, CellResult]], colour: str) -> str:
    items = "".join(
        f'<div class="beside-answer"><p class="soft">{number}</p><div class="text" dir="auto">{_text(cell)}</div></div>'
        for number, _, cell in group
    )
    return f'<section style="--c:{esc(colour)}"><h4>{swatch(colour)}{code(label)}</h4><div class="beside-row">{items}</div></section>'


def _text(cell: CellResult) -> str:
    if cell.status == "failed" and cell.error:
        return f"<i>{esc(cell.error.problem)}</i>"
    return esc(cell.shown_text) or "<i>no answer</i>"
