"""Below the sensitivity of parts: which of them to keep in 16 bits for a size, as a variant of the list."""

from __future__ import annotations

from typing import Any

import gradio as gr

from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.engines import get_engine
from comparator.fidelity import recipe
from comparator.fidelity.recipe import Recipe
from comparator.fidelity.sensitivity import Part
from comparator.ui.markup import code, esc
from comparator.ui.page import PRIVATE, Page, html
from comparator.ui.panel.variants import with_added
from comparator.ui.results.notice import problem, say
from comparator.util.recent import Recent

# What was measured, by (model, variant, reference, by): the page shows a table of it.
measured: Recent[tuple[str, Variant, Variant, str], tuple[Part, ...]] = Recent(32)


def build(page: Page, column: Any, by: Any, measurement_of: Any) -> None:
    """Not on a public server, where proposals would load models beside the queue of requests that are counted."""
    if page.settings.public:
        return
    with gr.Row(elem_classes="controls"):
        size = gr.Number(150, label="Target, MB", minimum=0, elem_id="recipe-size")
        ask = gr.Button("Propose a recipe", size="sm", scale=0, elem_id="recipe-run")
    answer = html(say(""), elem_id="recipe-said")

    def propose(shown: Any, name: str, parts: str, megabytes: Any, picked: Any):
        try:
            wanted = measurement_of(shown, name, parts)
            made = proposed(wanted, float(megabytes or 0))
            return summary_line(made), with_added(picked, made.variant.notation, page.settings.max_columns)
        except UserError as error:
            return problem(error), gr.skip()

    ask.click(
        propose, inputs=[page.shown, column, by, size, page.fields["picked"]], outputs=[answer, page.fields["picked"]],
        trigger_mode="once", **PRIVATE,
    )  # fmt: skip


def proposed(wanted: Any, megabytes: float) -> Recipe:
    """The recipe from what was measured of it. Raises `UserError` where nothing was."""
    recipe.check(wanted.variant)
    parts = measured.get((wanted.model, wanted.variant, wanted.reference, wanted.by))
    if parts is None:
        raise UserError("This has not been measured yet.", "Press Measure first.")
    return recipe.propose(
        get_engine(),
        wanted.model,
        wanted.variant,
        wanted.reference,
        parts,
        target_bytes=round(megabytes * 1e6),
    )


def summary_line(made: Recipe) -> str:
    parts = esc(", ".join(made.kept))
    return (
        f'<p class="notice" role="status"><span><b>Added to the variants:</b> {code(made.variant.notation)}, {made.bytes / 1e6:,.1f} MB, '
        f"{made.bits:.2f} bits per weight. Kept in 16 bits: {parts}, {made.share * 100:.0f} % of the parts’ divergences, summed. "
        f"{esc(recipe.RULE)} Press Run to compare it with the others.</span></p>"
    )
