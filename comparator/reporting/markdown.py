"""A comparison as a Markdown report. Text from outside is escaped or fenced."""

from __future__ import annotations

import re
from collections.abc import Iterable

from comparator.core.result import Comparison
from comparator.fidelity import verdict
from comparator.metrics.definitions import LEGEND, Place, present
from comparator.reporting import prompt_set, ratios, votes
from comparator.reporting.recommendation import recommend
from comparator.reporting.summary import (
    SECTIONS,
    VERDICT_HEAD,
    column_name,
    headline,
    state_of,
    stored_as,
    verdict_rows,
)
from comparator.util import formatting


def to_markdown(comparison: Comparison) -> str:
    """Tables and answers, to paste into an issue."""
    parts = [f"# {inline(comparison.model)}: {inline(', '.join(c.label for c in comparison.cells))}", ""]
    parts += [
        f"- **{name}**: {inline(value)}" for name, value in headline(comparison) if value != formatting.NONE
    ]
    if recommended := recommend(
        comparison.cells, verdict.reference_cell(comparison), prompt_set.summaries(comparison)
    ):
        parts += ["", f"**{inline(recommended.sentence)}**", ""]
        parts += [f"- {inline(line)}" for line in recommended.lines]
    if comparison.prompt.system:
        parts += ["", "**System prompt**", "", _fenced(comparison.prompt.system)]
    parts += ["", "**Prompt**", "", _fenced(comparison.prompt.text)]
    for title, places in SECTIONS.items():
        parts += ["", f"## {title}", "", *_metrics_table(comparison, places)]
    if rows := verdict_rows(comparison):
        parts += ["", "## Verdict", "", _md_row(VERDICT_HEAD), "|---" * len(VERDICT_HEAD) + "|"]
        parts += [*map(_md_row, rows), "", inline(verdict.RULE)]
    parts += [
        "",
        f"MB is 10⁶ bytes; × is the ratio to the reference; – was not measured; {LEGEND}.",
        "",
        *_prompt_set(comparison),
        *_votes(comparison),
        "## Answers",
    ]
    for cell in comparison.cells:
        parts += ["", f"### {inline(cell.label)} ({state_of(cell)})", ""]
        if cell.error:
            parts += [f"**{inline(cell.error.problem)}** {inline(cell.error.advice)}", ""]
        if cell.text:
            parts += [_fenced(cell.shown_text), ""]
        if cell.kernel:
            parts.append(
                f"- multiplied by {inline(cell.kernel)}, decode path {inline(cell.decode_path or formatting.NONE)}"
            )
        parts += [f"- {inline(note)}" for note in cell.notes]
        parts += [f"- {inline(line)}" for line in stored_as(cell)]
    return "\n".join(parts).rstrip() + "\n"


def _prompt_set(comparison: Comparison) -> list[str]:
    """The set's columns, every prompt, and the answers of those whose check flipped."""
    if comparison.prompt_set is None:
        return []
    labels = [cell.label for cell in comparison.cells]
    table = prompt_set.rows(comparison)
    parts = [f"## {inline(prompt_set.title(comparison))}", ""]
    head, scores = prompt_set.score_table(comparison)
    if scores:
        parts += [_md_row(head), "|---" * len(head) + "|", *map(_md_row, scores), ""]
    parts += [_md_row(prompt_set.SUMMARY_HEAD)]
    parts += ["|---" * len(prompt_set.SUMMARY_HEAD) + "|", *map(_md_row, prompt_set.summary_rows(comparison))]
    parts += [
        "",
        inline(prompt_set.note(comparison)),
        "",
        _md_row(("prompt", "kind", *labels)),
        "|---" * (2 + len(labels)) + "|",
    ]
    parts += [
        _md_row((
            f"{row.prompt.id}: {prompt_set.shortly(row.prompt.prompt, 60)}", row.prompt.kind,
            *map(prompt_set.cell_words, row.answers, row.flips),
        ))
        for row in table
    ]  # fmt: skip
    for row in table:
        if not any(row.flips):
            break
        parts += ["", f"### {inline(row.prompt.id)}: {inline(prompt_set.check_words(row.prompt))}"]
        parts += ["", _fenced(row.prompt.text)]
        for label, answer, flip in zip(labels, row.answers, row.flips, strict=True):
            if answer is not None:
                why = prompt_set.why_words(answer)
                heading = f"**{inline(label)}**: {inline(prompt_set.cell_words(answer, flip))}"
                parts += ["", f"{heading} ({inline(why)})" if why else heading, "", _fenced(answer.text)]
    return [*parts, ""]


def _votes(comparison: Comparison) -> list[str]:
    """Win rates of all blind votes, by visitor where there are several, and by each judge."""
    parts: list[str] = []
    if votes.title(comparison):
        visitors = votes.visitor_rows(comparison)
        parts += [f"## {inline(votes.title(comparison))}", "", *_rates(votes.HEAD, votes.totals(comparison))]
        parts += _rates(votes.visitor_head(comparison), visitors) if len(visitors) > 1 else []
        parts += [inline(votes.RULE), ""]
    judges = comparison.votes.judges if comparison.votes else ()
    for judge in judges:
        parts += [f"## {inline(votes.judge_title(judge))}", ""]
        if rows := votes.judge_totals(comparison, judge):
            parts += _rates(votes.HEAD, rows)
        parts += [*(f"- {inline(line)}" for line in votes.judge_sentences(comparison, judge)), ""]
    return [*parts, inline(votes.JUDGE_RULE), ""] if judges else parts


def _rates(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    return [_md_row(head), "|---" + "|---:" * (len(head) - 1) + "|", *map(_md_row, rows), ""]


def _md_row(values: Iterable[str]) -> str:
    return f"| {' | '.join(map(inline, values))} |"


def _metrics_table(comparison: Comparison, places: tuple[Place, ...]) -> list[str]:
    metrics = present(comparison, *places)
    titles = [inline(f"{m.title} ({m.unit_and_direction})" if m.unit else m.heading) for m in metrics]
    lines = ["| column | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(metrics)]
    for cell in comparison.cells:
        values = [f"{m.format(cell)} {ratios.beside(comparison, cell, m)}".strip() for m in metrics]
        lines.append(f"| {inline(column_name(comparison, cell))} | " + " | ".join(values) + " |")
    return lines


def inline(text: str) -> str:
    """Inline text: nothing in it is Markdown or HTML, and it stays on one line of a table."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", flat)


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
