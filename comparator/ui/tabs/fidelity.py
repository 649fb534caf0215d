"""The Fidelity tab: how far each column's predictions are from the reference's, and where that comes from."""

from __future__ import annotations

import gradio as gr

from comparator.core.result import Comparison
from comparator.fidelity import length, verdict
from comparator.reporting.plots import fidelity
from comparator.ui.form import Shown
from comparator.ui.markup import esc, note
from comparator.ui.page import PRIVATE, Choice, Page, html, picture
from comparator.ui.results.fidelity_tables import refusals, text_table, verdict_table
from comparator.ui.results.token_view import coloured, token_table
from comparator.ui.tabs import sensitivity

EMPTY = (
    "Select two variants and press Run. Variants are scored after the last answer; this tab then shows how far their "
    "predictions are from the reference's."
)


def build(page: Page) -> None:
    with gr.Tab("Fidelity", id="fidelity"):
        intro = html(note(EMPTY))
        verdicts = html(elem_id="fidelity-verdict")
        with gr.Row(elem_classes="plots", visible=False) as pictures:
            scatter = picture("Memory and KL divergence")
            lines = picture("KL divergence by token")
        text = html(elem_id="fidelity-text")
        with gr.Row(elem_classes="plots one", visible=False) as over_row:
            over_length = picture("KL divergence over the length of the text")
        with gr.Row(elem_classes="controls", visible=False) as controls:
            column = Choice([], label="Variant", filterable=False, elem_id="fidelity-column")
        tokens = html(elem_id="fidelity-tokens")
        with gr.Row(elem_classes="plots one", visible=False) as map_row:
            heat = picture("Weight error by layer and module")
        sensitivity.build(page)
        page.on_comparison(
            show,
            [intro, verdicts, pictures, scatter, lines, text, over_row, over_length, controls, column],
            running=True,
        )
        gr.on(
            [page.shown.change, column.change],
            view, inputs=[page.shown, column], outputs=[tokens, map_row, heat], trigger_mode="always_last", **PRIVATE,
        )  # fmt: skip


def show(shown: Shown):
    comparison = shown.comparison
    if comparison is None or not any(c.fidelity for c in comparison.cells):
        return (
            note(esc(why_nothing(shown))), "", gr.Row(visible=False), gr.skip(), gr.skip(), "",
            gr.Row(visible=False), gr.skip(), gr.Row(visible=False), gr.Dropdown(choices=[], value=None),
        )  # fmt: skip
    names, long = measured(comparison), bool(length.measured(comparison))
    unfinished = "Variants are still being scored. " if shown.running else ""
    return (
        note(esc(unfinished + explained(comparison))),
        verdict_table(comparison) + refusals(comparison),
        gr.Row(visible=True),
        fidelity.trade_off(comparison),
        fidelity.kl_by_token(comparison),
        text_table(comparison),
        gr.Row(visible=long),
        fidelity.kl_over_length(comparison) if long else gr.skip(),
        gr.Row(visible=bool(names)),
        gr.Dropdown(choices=names, value=most_divergent(comparison, names)),
    )


def measured(comparison: Comparison) -> list[str]:
    """Labels of the columns that have figures by token or by layer; the reference last."""
    cells = [
        c for c in comparison.cells if (c.fidelity and c.fidelity.prompt) or any(r.error for r in c.layers)
    ]
    return [c.label for c in sorted(cells, key=lambda c: c is verdict.reference_of(comparison, c))]


def most_divergent(comparison: Comparison, names: list[str]) -> str | None:
    """The column that is furthest from the reference: selected first."""
    far = {c.label: cells.mean for c in comparison.cells if (cells := verdict.divergence(c))}
    return max(names, key=lambda name: far.get(name, -1.0)) if names else None


def why_nothing(shown: Shown) -> str:
    """What has to happen until there is something to show."""
    comparison, request = shown.comparison, shown.running
    if request and request.fidelity != "none" and len(request.cells) > 1:
        answered = len(comparison.cells) if comparison else 0
        return f"{answered} of {len(request.cells)} variants have answered. They are scored after the last answer."
    if comparison is None and request is None:
        return EMPTY
    if len(request.cells if request else comparison.cells) < 2:
        return "There is only one variant, so nothing to compare it with. Select a second one and press Run."
    return "Fidelity was not measured in this comparison. Turn it on under Fidelity and press Run."


def explained(comparison: Comparison) -> str:
    name = comparison.reference
    reference = name.variant + (f" + {name.adapter}" if name.adapter else "") if name else "the reference"
    cell = next((c for c in comparison.cells if verdict.figure(c, "tokens") is not None), None)
    text = (
        f"Every variant scored the answer of {reference} token by token, as in decoding. KL divergence measures how far "
        "its probabilities are from the reference's, in nats: 0 means identical, 0.1 is noticeable, 1 is like "
        "a different model."
    )
    if cell is None:
        return f"{text} These figures are from one answer; for averages over a text, choose “this answer and a text” under Fidelity."
    tokens, context, stride = (verdict.figure(cell, key) for key in ("tokens", "context", "stride"))
    title = cell.fidelity.text.get("name")
    how = (
        f", context {context:,.0f}, stride {stride:,.0f}, one window at a time" if context and stride else ""
    )
    return f"{text} Averages are over {tokens:,.0f} tokens of {title if isinstance(title, str) else 'a text'}{how}."


def view(shown: Shown, name: str | None):
    """(tokens, row of the heat map, heat map) of the selected column."""
    comparison = shown.comparison
    cell = next((c for c in comparison.cells if c.label == name), None) if comparison else None
    if cell is None:
        return "", gr.Row(visible=False), gr.skip()
    prompt = cell.fidelity.prompt if cell.fidelity else None
    tokens = coloured(cell, prompt) + token_table(prompt) if prompt and prompt.tokens else ""
    if not fidelity.layer_grid(cell)[1]:
        return tokens, gr.Row(visible=False), gr.skip()
    return tokens, gr.Row(visible=True), fidelity.layer_map(cell)
