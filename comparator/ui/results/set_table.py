"""A prompt set's result: a line per column, and the matrix of prompts and columns, filtered, sorted, a page at a time."""

from __future__ import annotations

from collections.abc import Callable

import gradio as gr

from comparator.core.result import Comparison
from comparator.reporting import prompt_set, set_matrix
from comparator.reporting.prompt_set import Row
from comparator.ui.form import Shown
from comparator.ui.markup import esc, note, table
from comparator.ui.page import PRIVATE, Choice, Page, html
from comparator.util import formatting

PAGE_SIZE = 25
ALL = "all"
MATTERS, AS_WRITTEN, BY_KIND = "matters", "written", "kind"
SHOWN: dict[str, tuple[str, Callable[[Row], bool]]] = {
    ALL: ("all prompts", lambda row: True),
    "flipped": ("checks that flipped", lambda row: any(row.flips)),
    "failed": ("checks that failed", lambda row: any(a and a.passed is False for a in row.answers)),
    "different": (
        "answers that differ",
        lambda row: any(a and a.first_difference is not None for a in row.answers),
    ),
    "missing": ("without an answer", lambda row: any(a is None or a.error is not None for a in row.answers)),
}


def build(page: Page) -> None:
    with gr.Column(visible=False, elem_id="prompt-set-result") as section:
        summary = html()
        with gr.Row(elem_classes="controls set-controls"):
            only = Choice(
                [(t, k) for k, (t, _) in SHOWN.items()],
                value=ALL,
                label="Show",
                filterable=False,
                elem_id="set-only",
            )
            kind = Choice([ALL], value=ALL, label="Kind", filterable=False, elem_id="set-kind")
            order = Choice([MATTERS], value=MATTERS, label="Order", filterable=False, elem_id="set-order")
            search = gr.Textbox(
                "", label="Search", placeholder="in prompts and answers", max_lines=1, elem_id="set-search"
            )
        matrix = html(elem_id="set-matrix")
        with gr.Row(elem_classes="set-pages") as pages:
            back = gr.Button("Previous", size="sm", scale=0, elem_id="set-back")
            ahead = gr.Button("Next", size="sm", scale=0, elem_id="set-next")
    start = gr.State(0)
    inputs, drawn = [page.shown, only, kind, order, search], [matrix, start, pages, back, ahead]

    page.on_comparison(show, [section, summary, only, kind, order, search, *drawn], at_once=True)

    def turned(by: int):
        return lambda shown, a, b, c, d, at: draw(shown, a, b, c, d, at + by * PAGE_SIZE)

    gr.on(
        [only.input, kind.input, order.input, search.change], lambda *values: draw(*values, 0),
        inputs=inputs, outputs=drawn, trigger_mode="always_last", **PRIVATE,
    )  # fmt: skip
    back.click(turned(-1), inputs=[*inputs, start], outputs=drawn, **PRIVATE)
    ahead.click(turned(1), inputs=[*inputs, start], outputs=drawn, **PRIVATE)


def show(shown: Shown):
    comparison = shown.comparison
    if comparison is None or comparison.prompt_set is None:
        return (gr.Column(visible=False), "", *[gr.skip()] * 4, "", 0, *[gr.skip()] * 3)
    kinds = list(dict.fromkeys(p.kind for p in comparison.prompt_set.prompts if p.kind))
    return (
        gr.Column(visible=True), summary_of(comparison), ALL,
        gr.Dropdown([("all kinds", ALL), *((k, f"kind:{k}") for k in kinds)], value=ALL, visible=bool(kinds)),
        gr.Dropdown(orders(comparison), value=MATTERS), "",
        *draw(shown, ALL, ALL, MATTERS, "", 0),
    )  # fmt: skip


def summary_of(comparison: Comparison) -> str:
    rows = [[esc(value) for value in row] for row in prompt_set.summary_rows(comparison)]
    head = [(name, "") for name in prompt_set.SUMMARY_HEAD]
    title, scores = prompt_set.title(comparison), ""
    names, lines = prompt_set.score_table(comparison)
    if lines:
        cells = [[esc(value) for value in line] for line in lines]
        scores = table(
            [(n, "") for n in names],
            cells,
            caption="Scores",
            numeric=range(1, len(names)),
            name="task-scores",
        )
    made = table(head, rows, caption=title, numeric=range(1, len(head)), name="prompt-set")
    return f"<h3>{esc(title)}</h3>{scores}{made}{note(esc(prompt_set.note(comparison)))}"


def orders(comparison: Comparison) -> list[tuple[str, str]]:
    """Where it matters first, as the set has them, by kind, and by each column's figures."""
    reference = prompt_set.reference_index(comparison)
    others = [(n, c.label) for n, c in enumerate(comparison.cells) if n != reference]
    columns = [(f"{what} of {label}", f"{key}:{n}") for n, label in others for key, what in _FIGURES]
    return [("where it matters", MATTERS), ("as in the set", AS_WRITTEN), ("by kind", BY_KIND), *columns]


_FIGURES = (("kl", "largest KL"), ("agreement", "least agreement"), ("first", "earliest difference"))
_KEYS: dict[str, Callable] = {
    "kl": lambda a: -(a.kl if a.kl is not None else -1.0),
    "agreement": lambda a: a.agreement if a.agreement is not None else 2.0,
    "first": lambda a: a.first_difference if a.first_difference is not None else float("inf"),
}


def select(comparison: Comparison, only: str, kind: str, order: str, search: str) -> list[Row]:
    """The rows that the filters leave, in that order. What the browser sent and is unknown here filters nothing."""
    keep = SHOWN.get(only, SHOWN[ALL])[1]
    words = str(search or "").lower().split()[:20]
    rows = [
        row for row in prompt_set.rows(comparison)
        if keep(row) and (not str(kind).startswith("kind:") or row.prompt.kind == kind[5:]) and _has(row, words)
    ]  # fmt: skip
    figure, _, column = str(order).partition(":")
    if order == AS_WRITTEN:
        rows.sort(key=lambda row: row.number)
    elif order == BY_KIND:
        rows.sort(key=lambda row: row.prompt.kind)
    elif figure in _KEYS and column.isdigit() and int(column) < len(comparison.cells):
        rows.sort(
            key=lambda row: (
                not row.answers[int(column)],
                _KEYS[figure](a) if (a := row.answers[int(column)]) else 0,
            )
        )
    return rows


def _has(row: Row, words: list[str]) -> bool:
    if not words:
        return True
    text = "\n".join((row.prompt.id, row.prompt.prompt, *(a.text for a in row.answers if a))).lower()
    return all(word in text for word in words)


def draw(shown: Shown, only: str, kind: str, order: str, search: str, start: int):
    """(the matrix, where it starts, the row of buttons, the two buttons)."""
    comparison = shown.comparison
    if comparison is None or comparison.prompt_set is None:
        return (gr.skip(),) * 5
    rows = select(comparison, only, kind, order, search)
    start = max(0, min(start, (len(rows) - 1) // PAGE_SIZE * PAGE_SIZE))
    part = rows[start : start + PAGE_SIZE]
    total = len(comparison.prompt_set.prompts)
    left = (
        f"{len(rows):,} of {formatting.plural(total, 'prompt')}"
        if len(rows) < total
        else formatting.plural(total, "prompt")
    )
    where = (
        f"{start + 1:,} to {start + len(part):,} of {left}. Open a row to read the answers."
        if part
        else "No prompt is left."
    )
    return (
        f'<p class="foot">{esc(where)}</p>{set_matrix.render(comparison, part)}',
        start,
        gr.Row(visible=len(rows) > PAGE_SIZE),
        gr.Button(interactive=start > 0),
        gr.Button(interactive=start + PAGE_SIZE < len(rows)),
    )
