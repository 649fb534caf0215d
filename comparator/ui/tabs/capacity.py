"""The Capacity tab: what of the selected model fits on a card, with how long a context and how many users (an estimate), and
how fast the variants are under load (tabs/sweep.py)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import gradio as gr

from comparator.capacity import cards, words
from comparator.core.errors import UserError
from comparator.deploy.limits import Limits
from comparator.engines import get_engine
from comparator.ui.markup import code, esc, note, sized, table
from comparator.ui.page import PRIVATE, Choice, Page, html
from comparator.ui.results.notice import problem, say
from comparator.ui.tabs import sweep

_INTRO = (
    "An estimate from the headers of the selected model's files: weights and quant state by method, the KV cache of all users, "
    "activations, the longest context and the roofline. No weights are downloaded."
)
_PUBLIC = (
    "Not on this public server: python -m comparator plan MODEL --gpu CARD estimates it on your machine."
)
_EXPLAINED = {
    "weights": "as the method stores them",
    "quant state": "scales, zero points and codebooks",
    "KV cache": "of all users together",
    "total": "including memory reserved for workspaces",
    "largest context": "tokens per user that still fit",
    "roofline": "tokens per second of all users at full memory bandwidth",
}


def build(page: Page) -> None:
    with gr.Tab("Capacity", id="capacity"):
        html(f"<h3>What fits</h3>{note(esc(_PUBLIC if page.settings.public else _INTRO))}")
        if not page.settings.public:
            _build_planner(page)
        sweep.build(page)


def _build_planner(page: Page) -> None:
    with gr.Row(elem_classes="controls wide"):
        card = Choice(
            cards.names(),
            value=cards.HERE,
            label="Card, or 24GB@1008GB/s",
            allow_custom_value=True,
            elem_id="capacity-card",
        )
        context = gr.Textbox("4k", label="Context, tokens per user", max_lines=1, elem_id="capacity-context")
        users = gr.Textbox("1", label="Users at once", max_lines=1, elem_id="capacity-users")
        start = gr.Button("Estimate", size="sm", scale=0, elem_id="capacity-run")
    result, fitting = html(elem_id="capacity-result"), gr.State(())
    with gr.Row(elem_classes="sweep-files"):
        select = gr.Button(
            "Select what fits here", size="sm", scale=0, visible=False, elem_id="capacity-select"
        )

    async def estimate(model: str, linked: tuple[str, ...], card: str, context: str, users: str):
        yield say("Reading the model's headers …"), gr.skip(), gr.Button(visible=False)
        text, names = await asyncio.to_thread(
            _shown, page.admission.limits, model, linked, card, context, users
        )
        yield text, names, gr.Button(visible=bool(names))

    start.click(
        estimate,
        inputs=[page.fields["model"], page.linked, card, context, users],
        outputs=[result, fitting, select],
        trigger_mode="once",
        **PRIVATE,
    )
    select.click(
        selected, inputs=[page.fields["picked"], fitting], outputs=[page.fields["picked"]], **PRIVATE
    )


def selected(value: Any, names: tuple[str, ...]) -> Any:
    """The panel's list of variants with those selected that fit and can be run here, as many as it takes at once."""
    if not isinstance(value, dict) or not isinstance(value.get("rows"), list):
        return gr.skip()
    rows = [row for row in value["rows"] if isinstance(row, dict)]
    on = [row.get("notation") for row in rows if row.get("notation") in names and not row.get("why")]
    most = value.get("max") if isinstance(value.get("max"), int) else len(on)
    return {**value, "on": on[:most]} if on else gr.skip()


def _shown(
    limits: Limits, model: str | None, linked: tuple[str, ...], card: str, context: str, users: str
) -> tuple[str, tuple[str, ...]]:
    """(the plan as HTML, or what is wrong with the form; the variants that fit on this machine)."""
    from comparator.capacity import estimate
    from comparator.sources import open_headers
    from comparator.util import quantities

    try:
        name = (model or "").strip()
        if not name or name in linked:
            raise UserError(
                "No model is selected.", "Select one, or press Run to look up the model of the link."
            )
        limits.check_source(name)
        if (card or cards.HERE) == cards.HERE and get_engine().queue.busy:
            raise UserError(
                "The bandwidth of this machine cannot be measured while a comparison runs.",
                "Wait until it ends, or choose a card by its name.",
            )
        tokens, count = quantities.tokens(context), quantities.tokens(users)
        checkpoint, where = open_headers(name), cards.find(card)
        listed = estimate.default_variants(checkpoint, where.device)
        plan = estimate.plan(checkpoint, where, tokens, count, listed)
    except UserError as wrong:
        return problem(wrong), ()
    here = (card or cards.HERE) == cards.HERE
    residents = get_engine().state().residents if here else ()
    # As the panel lists them: a row's own notation has the sizes that the model decided, gptq:g64 say.
    fitting = (v.notation for v, row in zip(listed, plan.rows, strict=True) if row.fits and not row.error)
    names = tuple(fitting) if here else ()
    return "".join(_rendered(plan, residents)), names


def _rendered(plan, residents) -> Iterator[str]:
    lines = list(words.intro(plan))
    yield note("<br>".join(map(esc, lines)))
    head = [(heading.capitalize(), _EXPLAINED.get(heading, "")) for heading in words.HEADINGS]
    yield table(
        head,
        [_cells(row) for row in plan.rows if not row.error],
        caption="Estimate per variant",
        numeric=(1, 2, 3, 4, 5, 7, 8),
        name="capacity",
    )
    yield note("<br>".join(map(esc, [*words.measured(plan, residents), *words.remarks(plan)])))


def _cells(row) -> list[str]:
    keys = {
        1: row.weight_bytes, 2: row.state_bytes, 3: row.kv_bytes, 4: row.activation_bytes + row.graph_bytes, 5: row.total_bytes,
        7: row.longest_context or 0, 8: row.tok_s or 0,
    }  # fmt: skip
    texts = words.cells(row)
    return [
        code(texts[0]),
        *(sized(t, keys[n]) if n in keys else esc(t) for n, t in enumerate(texts[1:], 1)),
    ]
