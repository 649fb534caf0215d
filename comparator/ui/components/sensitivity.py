"""“Which part hurts most?” at the end of the Fidelity tab: one part of a column quantized at a time, measured here.

Goes through the same limits and the same line as a comparison. Knows nothing of how a part is measured.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from comparator import lend, plots, plots_fidelity, sources, verdict, words
from comparator.backends import methods, resolve
from comparator.types import Cell, Comparison, GenerationSettings, Problem, Request, Scoring, Stopped, Variant
from comparator.ui.components.notice import problem, say
from comparator.ui.handlers import PULSE_S, TICK_S, Pump
from comparator.ui.markup import code, esc, note, sized, table
from comparator.ui.page import DIRECT, PRIVATE, Choice, Page, picture
from comparator.ui.state import Shown, variant_of

TOKENS = 512  # of the text that comes with this project
BY = (
    ("kind of layer, the quickest", "kind"),
    ("decoder layer", "layer"),
    ("every layer alone, the longest", "module"),
)
HEADS = (
    ("Part", "quantized alone, all else as in the reference"),
    ("KL, nats", "mean KL(reference ‖ the reference with this part quantized), ± its standard error"),
    ("maximum", "at the worst token"),
    ("Agrees", "how often both put the same token first"),
    ("Layers", "linear layers in this part"),
)
WHY = (
    "Puts one part of the column at a time into the reference, kernels included, and lets both read the same "
    f"{TOKENS} tokens. The parts do not add up to the whole, in which their errors meet. Adapters are left out."
)


@dataclass(frozen=True)
class Asked:
    """What is measured: parts of `variant` put into `reference`. `recorded`: the comparison was opened, not run."""

    model: str
    variant: Variant
    reference: Variant
    by: str
    recorded: bool = False

    @property
    def request(self) -> Request:
        """The same as the limits judge it: two columns of one token."""
        return Request(
            self.model, (Cell(self.reference), Cell(self.variant)), "",
            settings=GenerationSettings(max_new_tokens=1), fidelity="none",
        )  # fmt: skip


def build(page: Page) -> None:
    with gr.Column(visible=False, elem_id="parts") as whole:
        gr.HTML(f"<h3>Which part hurts most?</h3>{note(esc(WHY))}", apply_default_css=False)
        with gr.Row(elem_classes="controls"):
            column = Choice([], label="Column", filterable=False, elem_id="parts-column")
            by = Choice(list(BY), value="kind", label="By", filterable=False, elem_id="parts-by")
            start = gr.Button("Measure", size="sm", scale=0, elem_id="parts-run")
            stop = gr.Button("Stop", size="sm", scale=0, interactive=False, elem_id="parts-stop")
        said = gr.HTML(say(""), elem_id="parts-said", apply_default_css=False)
        with gr.Row(elem_classes="plots one", visible=False) as pictures:
            bars = picture("Divergence with one part quantized")
        rows = gr.HTML("", elem_id="parts-table", apply_default_css=False)

    async def run(request: gr.Request, shown: Shown, name: str, by: str) -> AsyncIterator[list[Any]]:
        async for values in stream(page, shown, name, by, request):
            yield values

    async def halt(request: gr.Request) -> None:
        page.parts.stop(
            request.session_hash
        )  # the line is the stream's alone: two writers would overtake each other

    page.on_comparison(offer, [whole, column, pictures, rows])
    start.click(
        run, inputs=[page.shown, column, by], outputs=[said, start, stop, pictures, bars, rows],
        trigger_mode="once", **PRIVATE,
    )  # fmt: skip
    stop.click(halt, **DIRECT)


def offer(shown: Shown):
    """The columns to choose from, the quantized one that is furthest from the reference first."""
    if shown.comparison is None:
        return tuple(gr.skip() for _ in range(4))
    names = list(dict.fromkeys(cell.variant for cell in shown.comparison.cells))
    chosen = gr.Dropdown(choices=names, value=first_choice(shown.comparison, names))
    return gr.Column(visible=True), chosen, gr.Row(visible=False), ""


def first_choice(comparison: Comparison, names: list[str]) -> str | None:
    far = {c.variant: found.mean for c in comparison.cells if (found := verdict.divergence(c))}
    reference = comparison.reference.variant if comparison.reference else None
    good = [n for n in names if n != reference and quantized(variant_of(n))]
    return max(good or names, key=lambda name: far.get(name, -1.0), default=None)


def quantized(variant: Variant | None) -> bool:
    return variant is not None and methods()[variant.method][1].bits < 16


def asked(shown: Shown, name: str | None, by: str | None, public: bool = False) -> Asked:
    """What the choices ask for. Raises `Problem` where it makes no sense, before anything is loaded."""
    comparison = shown.comparison
    if comparison is None or name not in {c.variant for c in comparison.cells}:
        raise Problem("This column is not on the page.", "Choose one from the list, or press Run first.")
    if by not in {value for _, value in BY}:
        raise Problem("It is not chosen what a part is.", "Choose kind, decoder layer or every layer alone.")
    variant = resolve(name)
    if not quantized(variant):
        others = [n for c in comparison.cells if quantized(variant_of(n := c.variant))]
        raise Problem(
            f"{name} quantizes nothing, so no part of it can hurt.",
            f"Choose {others[0]} instead."
            if others
            else "Tick a quantized variant, nf4 for instance, and press Run.",
        )
    if comparison.reference is None:
        raise Problem("This comparison has no reference.", "Tick bf16 too and press Run.")
    reference = resolve(comparison.reference.variant)
    if variant == reference:
        raise Problem(
            f"{name} is the reference here: it differs from itself in nothing.",
            "Choose another column, or make bf16 the reference and press Run.",
        )
    if public and by == "module":
        raise Problem(
            "Every layer alone takes hundreds of passes, too many for a public server.",
            "Choose kind or decoder layer, or run Quant Comparator on your own machine.",
        )
    return Asked(comparison.model, variant, reference, by, shown.recorded)


def measured(page: Page, wanted: Asked, tokens: int, stop: threading.Event) -> Iterator[Any]:
    """Progress, last the parts. May ask the Hub how large the model is, so not on the page's own thread."""
    page.desk.judge_size(wanted.request)
    if wanted.recorded and not sources.is_here(wanted.model, settings=page.settings):
        raise Problem(
            f"This is a recording, and its model {wanted.model} is not on this machine.",
            "Press “Run this here” above and then Run, which brings the model here; then measure.",
        )
    yield from lend.parts(wanted.model, wanted.variant, wanted.reference, wanted.by, tokens, stop)


async def stream(
    page: Page, shown: Shown, name: str | None, by: str | None, asker: Any, tokens: int = TOKENS
) -> AsyncIterator[list[Any]]:
    """One measurement, from the press to the picture; yields the values of (line, Measure, Stop, the pictures' row,
    figure, table). Ends early when the visitor leaves."""
    session = asker.session_hash or ""
    try:
        wanted = asked(shown, name, by, page.settings.public)
        page.desk.admit(wanted.request, asker)
    except Problem as wrong:
        yield [problem(wrong), *_buttons(False), *_kept(3)]
        return
    stop = page.parts.begin(session)
    try:
        line, began = say("Starting …"), time.monotonic()
        yield [line, *_buttons(True), *_kept(3)]
        pump, told, found = Pump(measured(page, wanted, tokens, stop)), began, ()
        while True:
            ended, before = pump.ended.is_set(), line  # asked before draining, so that nothing is left behind
            for item in pump.drain():
                if isinstance(item, Scoring):
                    line = progress(item)
                else:
                    found = item
            if ended:
                break
            line = say("Stopping …") if stop.is_set() else line
            if line != before or time.monotonic() - told > PULSE_S:
                told = time.monotonic()
                yield [line, *_kept(5)]
            await asyncio.sleep(TICK_S)
        if found:
            yield [
                over(found, time.monotonic() - began),
                *_buttons(False),
                *results(shown.comparison, wanted, found),
            ]
        else:
            yield [broken_off(pump.error), *_buttons(False), *_kept(3)]
    finally:
        stop.set()  # a visitor who left: the generator was closed in the middle
        page.parts.end(session, stop)


def _kept(count: int) -> list[Any]:
    return [gr.skip() for _ in range(count)]


def _buttons(running: bool) -> list[Any]:
    return [gr.Button(interactive=not running), gr.Button(interactive=running)]


def progress(event: Scoring) -> str:
    if event.message.endswith(" ahead"):
        return say(f"Waiting: {event.message}. It starts by itself.")
    return say(event.message, f"{event.fraction * 100:.0f} %" if event.fraction is not None else "")


def over(found: tuple, took_s: float) -> str:
    worst = found[0]
    error = "" if worst.kl_se is None else f" ± {words.small(worst.kl_se, 1)}"
    return say(
        f"Done in {words.seconds(took_s)}: {worst.name} hurts most, {words.small(worst.kl_mean)}{error} nats by itself."
    )


def broken_off(error: BaseException | None) -> str:
    """Why there are no parts: Stop, something a person can act on, or a defect."""
    if error is None or isinstance(error, Stopped):
        return say("Stopped.")
    if isinstance(error, Problem):
        return problem(error)
    return problem(
        Problem(
            f"The measurement broke off: {type(error).__name__}: {error}".strip(),
            "Press Measure to try again. If it happens again, please report it with these words.",
        )
    )


def results(comparison: Comparison, wanted: Asked, found: tuple) -> list[Any]:
    """(the pictures' row, the figure, the table behind it)."""
    colour = plots.comparison_colours(comparison).get(wanted.variant.notation, plots.PALETTE[0])
    return [gr.Row(visible=True), plots_fidelity.parts_bars(found, colour), parts_table(wanted, found)]


def parts_table(wanted: Asked, found: tuple) -> str:
    rows = [
        [
            code(part.name),
            sized(
                words.small(part.kl_mean)
                + ("" if part.kl_se is None else f" ± {words.small(part.kl_se, 1)}"),
                part.kl_mean,
            ),
            sized(words.small(part.kl_max), part.kl_max),
            sized(words.percent(part.top1), part.top1),
            sized(f"{len(part.modules):,}", len(part.modules)),
        ]
        for part in found
    ]
    more = len(found) - plots_fidelity.MOST_PARTS
    cut = f" The picture shows the worst {plots_fidelity.MOST_PARTS} of {len(found)}." if more > 0 else ""
    caption = (
        f"{wanted.model}: {wanted.variant.notation} against {wanted.reference.notation}, one part at a time, "
        f"{found[0].tokens:,} tokens, measured on this machine just now.{cut}"
    )
    return table(HEADS, rows, caption=caption, numeric=range(1, 5), name="parts")
