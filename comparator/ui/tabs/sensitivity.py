"""Sensitivity, at the end of the Fidelity tab: KL divergence with one part of the model quantized at a time.

Subject to the same limits and queue as a comparison.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr

from comparator import sources
from comparator.backends import methods, resolve
from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings, Request
from comparator.core.result import Comparison
from comparator.core.variant import Cell, Variant
from comparator.deploy import zerogpu_runner
from comparator.engine.protocol import OnProgress
from comparator.engines import get_engine
from comparator.fidelity import verdict
from comparator.fidelity.sensitivity import Part
from comparator.reporting.plots import fidelity, style
from comparator.ui.form import Shown, variant_of
from comparator.ui.markup import code, esc, note, sized, table
from comparator.ui.page import DIRECT, PRIVATE, Choice, Page, html, picture
from comparator.ui.progress import batches, broken_off, run_buttons, running_line
from comparator.ui.results.notice import problem, say
from comparator.ui.tabs import recipe
from comparator.util import formatting
from comparator.util.streams import Background

TOKENS = 512  # of the bundled text
BY = (
    ("kind of layer (fastest)", "kind"),
    ("decoder layer", "layer"),
    ("single linear layer (slowest)", "module"),
)
HEADS = (
    ("Part", "quantized on its own, everything else as in the reference"),
    ("KL, nats", "mean KL(reference ‖ the reference with this part quantized), ± its standard error"),
    ("maximum", "at the token with the largest divergence"),
    ("Top-1", "top-1 agreement: how often both have the same most likely token"),
    ("Layers", "linear layers in this part"),
)
WHY = (
    "Replaces one part of the reference at a time by its quantized version, kernels included, and scores the same "
    f"{TOKENS} tokens. The parts do not add up to the whole, because errors interact. Adapters are not applied."
)


@dataclass(frozen=True)
class Measurement:
    """What is measured: parts of `variant` in `reference`. `recorded`: a saved comparison was opened, not run."""

    model: str
    variant: Variant
    reference: Variant
    by: str
    recorded: bool = False

    @property
    def request(self) -> Request:
        """A request that the limits can check: two columns of one token."""
        return Request(
            self.model, (Cell(self.reference), Cell(self.variant)), "",
            settings=GenerationSettings(max_new_tokens=1, repeats=1), fidelity="none",
        )  # fmt: skip


def build(page: Page) -> None:
    with gr.Column(visible=False, elem_id="parts") as whole:
        html(f"<h3>Which layers matter most?</h3>{note(esc(WHY))}")
        with gr.Row(elem_classes="controls"):
            column = Choice([], label="Variant", filterable=False, elem_id="parts-column")
            by = Choice(list(BY), value="kind", label="By", filterable=False, elem_id="parts-by")
            start = gr.Button("Measure", size="sm", scale=0, elem_id="parts-run")
            stop = gr.Button("Stop", size="sm", scale=0, interactive=False, elem_id="parts-stop")
        status = html(say(""), elem_id="parts-said")
        with gr.Row(elem_classes="plots one", visible=False) as pictures:
            bars = picture("KL divergence with one part quantized")
        rows = html(elem_id="parts-table")
        recipe.build(page, column, by, measurement_of)

    async def run(request: gr.Request, shown: Shown, name: str, by: str) -> AsyncIterator[list[Any]]:
        async for values in stream(page, shown, name, by, request):
            yield values

    async def halt(request: gr.Request) -> None:
        page.sensitivity_runs.stop(
            request.session_hash
        )  # only the stream writes the status line: two writers would overwrite each other

    def look(request: gr.Request, shown: Shown, name: str, by: str):
        return offer(page, Shown() if shown.running else shown, name, by, request.session_hash)

    page.shown.change(
        look, inputs=[page.shown, column, by], outputs=[whole, column, pictures, bars, rows], **PRIVATE
    )
    start.click(
        run, inputs=[page.shown, column, by], outputs=[status, start, stop, pictures, bars, rows],
        trigger_mode="once", **PRIVATE,
    )  # fmt: skip
    stop.click(halt, **DIRECT)


def offer(page: Page, shown: Shown, name: str | None, by: str, session: str | None) -> list[Any]:
    """(section, variants to select from, row of the plot, plot, table) for what is shown.

    While this visitor's measurement runs, all stay: a comparison that was started meanwhile is queued for it, and Stop has to
    be within reach. The figures of the selected variant are shown again below a new comparison that they apply to; else the
    quantized variant furthest from the reference is preselected.
    """
    if page.sensitivity_runs.going(session):
        return _unchanged(5)
    comparison = shown.comparison
    if comparison is None:
        return [gr.Column(visible=False), gr.skip(), gr.Row(visible=False), gr.skip(), ""]
    names = list(dict.fromkeys(cell.variant for cell in comparison.cells))
    measurement, parts = _known(shown, name, by)
    chosen = name if parts else first_choice(comparison, names)
    figures = results(comparison, measurement, parts) if parts else [gr.Row(visible=False), gr.skip(), ""]
    return [gr.Column(visible=True), gr.Dropdown(choices=names, value=chosen), *figures]


def _known(shown: Shown, name: str | None, by: str) -> tuple[Measurement | None, tuple[Part, ...] | None]:
    """The measurement that is selected and its parts; None without them."""
    try:
        measurement = measurement_of(shown, name, by)
    except UserError:
        return None, None
    return measurement, recipe.measured.get(_key(measurement))


def _key(measurement: Measurement) -> tuple[str, Variant, Variant, str]:
    return measurement.model, measurement.variant, measurement.reference, measurement.by


def first_choice(comparison: Comparison, names: list[str]) -> str | None:
    divergence = {c.variant: parts.mean for c in comparison.cells if (parts := verdict.divergence(c))}
    reference = comparison.reference.variant if comparison.reference else None
    good = [n for n in names if n != reference and quantized(variant_of(n))]
    return max(good or names, key=lambda name: divergence.get(name, -1.0), default=None)


def quantized(variant: Variant | None) -> bool:
    return variant is not None and methods()[variant.method][1].bits < 16


def measurement_of(shown: Shown, name: str | None, by: str | None, public: bool = False) -> Measurement:
    """The measurement that was selected. Raises `UserError` if it makes no sense, before anything is loaded."""
    comparison = shown.comparison
    if comparison is None or name not in {c.variant for c in comparison.cells}:
        raise UserError(
            "This variant is not part of the comparison.", "Select one from the list, or press Run first."
        )
    if by not in {value for _, value in BY}:
        raise UserError(
            "No kind of part is selected.", "Select kind of layer, decoder layer or single linear layer."
        )
    variant = resolve(name)
    if not quantized(variant):
        others = [n for c in comparison.cells if quantized(variant_of(n := c.variant))]
        raise UserError(
            f"{name} is not quantized, so there is nothing to measure.",
            f"Select {others[0]} instead."
            if others
            else "Select a quantized variant, for example nf4, and press Run.",
        )
    if comparison.reference is None:
        raise UserError("This comparison has no reference.", "Select bf16 as well and press Run.")
    reference = resolve(comparison.reference.variant)
    if variant == reference:
        raise UserError(
            f"{name} is the reference, so there is nothing to compare it with.",
            "Select another variant, or make bf16 the reference and press Run.",
        )
    if public and by == "module":
        raise UserError(
            "Single linear layers take hundreds of passes, too many for a public server.",
            "Select kind of layer or decoder layer, or run Quant Comparator on your own machine.",
        )
    return Measurement(comparison.model, variant, reference, by, shown.recorded)


def measured(
    page: Page, measurement: Measurement, tokens: int, stop: threading.Event, on_progress: OnProgress
) -> tuple[Part, ...]:
    """The parts. May query the Hub for the size of the model, so never call it on the event loop."""
    page.admission.judge_size(measurement.request)
    if measurement.recorded and not sources.is_here(measurement.model, settings=page.settings):
        raise UserError(
            f"This is a saved comparison, and its model {measurement.model} is not on this machine.",
            "Press “Run it here” above and then Run, which downloads the model; then measure.",
        )
    return zerogpu_runner.sensitivity(
        measurement.model, measurement.variant, measurement.reference, measurement.by, tokens, get_engine(), stop,
        on_progress,
    )  # fmt: skip


async def stream(
    page: Page, shown: Shown, name: str | None, by: str | None, asker: Any, tokens: int = TOKENS
) -> AsyncIterator[list[Any]]:
    """One measurement; yields values of (status, Measure, Stop, row of the plot, plot, table). Ends early when the visitor
    leaves."""
    session = asker.session_hash or ""
    try:
        measurement = measurement_of(shown, name, by, page.settings.public)
        page.admission.admit(measurement.request, asker)
    except UserError as error:
        yield [problem(error), *run_buttons(False), *_unchanged(3)]
        return
    stop = page.sensitivity_runs.begin(session)
    try:
        line, began = say("Starting …"), time.monotonic()
        yield [line, *run_buttons(True), *_unchanged(3)]
        background = Background(lambda emit: measured(page, measurement, tokens, stop, emit))
        async for emitted in batches(background, stop):
            for fraction, message in emitted:
                line = running_line(fraction, message)
            yield [say("Stopping …") if stop.is_set() else line, *_unchanged(5)]
        if background.error is None:
            parts = background.future.result()
            recipe.measured.put(_key(measurement), parts)
            yield [
                over(parts, time.monotonic() - began),
                *run_buttons(False),
                *results(shown.comparison, measurement, parts),
            ]
        else:
            yield [
                broken_off(background.error, "The measurement", "Measure"),
                *run_buttons(False),
                *_unchanged(3),
            ]
    finally:
        stop.set()  # the visitor left: the generator was closed
        page.sensitivity_runs.end(session, stop)


def _unchanged(count: int) -> list[Any]:
    return [gr.skip() for _ in range(count)]


def over(parts: tuple, took_s: float) -> str:
    worst = parts[0]
    error = "" if worst.kl_se is None else f" ± {formatting.small(worst.kl_se, 1)}"
    return say(
        f"Done in {formatting.seconds(took_s)}: {worst.name} matters most, {formatting.small(worst.kl_mean)}{error} nats on its own."
    )


def results(comparison: Comparison, measurement: Measurement, parts: tuple) -> list[Any]:
    """(row of the plot, plot, table)."""
    colour = style.comparison_colours(comparison).get(measurement.variant.notation, style.PALETTE[0])
    return [gr.Row(visible=True), fidelity.parts_bars(parts, colour), parts_table(measurement, parts)]


def parts_table(measurement: Measurement, parts: tuple) -> str:
    rows = [
        [
            code(part.name),
            sized(
                formatting.small(part.kl_mean)
                + ("" if part.kl_se is None else f" ± {formatting.small(part.kl_se, 1)}"),
                part.kl_mean,
            ),
            sized(formatting.small(part.kl_max), part.kl_max),
            sized(formatting.percent(part.top1), part.top1),
            sized(f"{len(part.modules):,}", len(part.modules)),
        ]
        for part in parts
    ]
    more = len(parts) - fidelity.MOST_PARTS
    cut = f" The plot shows the top {fidelity.MOST_PARTS} of {len(parts)}." if more > 0 else ""
    caption = (
        f"{measurement.model}: {measurement.variant.notation} vs {measurement.reference.notation}, one part at a time, "
        f"{parts[0].tokens:,} tokens, measured on this machine.{cut}"
    )
    return table(HEADS, rows, caption=caption, numeric=range(1, 5), name="parts")
