"""What happens when a visitor presses Run, Stop or Unload, and when the page is opened or closed.

Run streams: the engine's events arrive on a thread of their own and are collected here a few times a second, so that
the engine never waits for the page. Only what changed is sent to the browser.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from comparator.comparison.pace import Pace
from comparator.comparison.plan import Plan
from comparator.comparison.validation import checked
from comparator.core.errors import UserError
from comparator.core.events import Event, Finished, Generated, Scoring
from comparator.core.request import Request
from comparator.engine.explain import explain
from comparator.engines import get_engine
from comparator.ui import estimate, links
from comparator.ui.admission import owner_of
from comparator.ui.form import Form, Shown
from comparator.ui.page import DIRECT, PRIVATE, Page
from comparator.ui.panel import header, residents, variants
from comparator.ui.panel import model as model_panel
from comparator.ui.progress import PULSE_S, TICK_S
from comparator.ui.results import cards, notice, share, summary
from comparator.ui.view_state import Live
from comparator.util import error_log
from comparator.util.streams import Background


class RunOutputs:
    """The outputs of a run, in the order in which Gradio wants them.

    What did not change is sent as the very same value, which Gradio's diff reduces to nothing. `gr.skip()` and
    `gr.update()` would make it build the component again each time, so they stand only in the first and last yield.
    """

    recording, share = "", ""  # nothing to share while a comparison runs

    def __init__(self, slots: int):
        self.cards: list[Any] = [""] * slots
        self.summary: Any = ""
        self.notice = notice.say("Starting …")
        self.shown: Any = gr.skip()  # a State: skipping it costs nothing

    def values(self, running: bool | None = None) -> list[Any]:
        """All outputs. `running` enables Stop or Run; None leaves the buttons unchanged."""
        buttons = ["Run", "Stop"]
        if running is not None:
            buttons = [gr.update(interactive=not running), gr.update(interactive=running)]
        return [*self.cards, self.summary, self.notice, *buttons, self.recording, self.share, self.shown]

    def draw(self, live: Live, changed: set[int]) -> None:
        for number in changed:
            self.cards[number] = cards.render(live, live.columns[number], number)
        if changed:
            self.summary = summary.render(live)

    @classmethod
    def refused(cls, slots: int, problem: UserError) -> list[Any]:
        """Outputs for a refused request: only the line under Run changes."""
        view = cls(slots)
        view.cards, view.summary = [gr.skip()] * slots, gr.skip()
        view.recording = view.share = gr.skip()
        view.notice = notice.problem(problem)
        return view.values(running=False)


def outputs(page: Page) -> list[gr.components.Component]:
    return [
        *page.cards,
        page.summary,
        page.notice,
        page.run,
        page.stop,
        page.recording,
        page.share,
        page.shown,
    ]


def wire(page: Page, demo: gr.Blocks) -> None:
    """Connect what spans several parts of the page."""
    names = list(page.fields)

    async def run(request: gr.Request, owner: str, *values: Any) -> AsyncIterator[list[Any]]:
        form = Form(**dict(zip(names, values, strict=True)))
        async for view in stream(page, form, request, owner):
            yield view

    async def stop(request: gr.Request) -> str:
        going = page.runs.stop(request.session_hash)
        return notice.say("Stopping …" if going else "Nothing is running.")

    async def visitor_left(request: gr.Request) -> None:
        page.stop_runs(request.session_hash)

    started = gr.on(
        [page.run.click, page.fields["prompt"].submit],
        run,
        inputs=[page.owner, *page.fields.values()],
        outputs=outputs(page),
        # The values are ready-made HTML; Gradio's own pass over each output would cost a thread switch, ten times a
        # second.
        postprocess=False,
        trigger_mode="once",
        **PRIVATE,
    )
    estimate.wire(page, demo, started)
    page.refresh_history(started.then(around, outputs=[page.status, page.residents], **DIRECT))
    page.stop.click(stop, outputs=[page.notice], **DIRECT)
    demo.unload(visitor_left)
    gr.Timer(header.REFRESH_S).tick(around, outputs=[page.status, page.residents], **DIRECT)
    demo.load(around, outputs=[page.status, page.residents], **DIRECT)
    # One listener for both, so that a slow first lookup never overwrites the facts of a model typed in the meantime.
    gr.on(
        [demo.load, page.fields["model"].change],
        page.describe,
        inputs=[page.fields["model"], page.linked],
        outputs=[page.facts],
        trigger_mode="always_last",
        **PRIVATE,
    ).then(
        _variants_of(page),
        inputs=[page.fields["model"], page.linked, page.fields["picked"]],
        outputs=[page.fields["picked"]],
        **PRIVATE,
    ).then(_sizes_of(page), inputs=[page.fields["model"], page.linked], outputs=[page.sizes], **PRIVATE).then(
        None, inputs=[page.sizes], js="(sizes) => qc.sizes(sizes)", api_visibility="private"
    ).then(
        model_panel.examined, inputs=[page.fields["model"], page.linked], outputs=[page.examined], **PRIVATE
    )
    links.wire(page, demo)

    page.unload_all.click(
        residents.unloader(page.settings.public), outputs=[page.unload_status], **PRIVATE
    ).then(around, outputs=[page.status, page.residents], **DIRECT)
    for number, card in enumerate(page.cards):
        card.release(
            releaser(number, page.settings.public),
            inputs=[page.shown],
            outputs=[card, page.unload_status],
            **PRIVATE,
        ).then(around, outputs=[page.status, page.residents], **DIRECT)


def _variants_of(page: Page):
    def fit(model: str | None, linked: tuple[str, ...], value: Any):
        facts = model_panel.known_facts(model, linked, page.admission.limits)
        return variants.for_model(value, facts, page.settings.max_columns) or gr.skip()

    return fit


def _sizes_of(page: Page):
    def sizes(model: str | None, linked: tuple[str, ...]) -> dict[str, str]:
        facts = model_panel.known_facts(model, linked, page.admission.limits)
        return variants.written_sizes(model_panel.loaded_sizes(model) if facts else {})

    return sizes


def around():
    """The current header line and list of resident variants."""
    return header.current(), residents.current()


async def stream(page: Page, form: Form, asker: gr.Request, owner: str = "") -> AsyncIterator[list[Any]]:
    """One run, from the form to the last card; yields values of `outputs`. Ends early when the visitor leaves."""
    view, session = RunOutputs(len(page.cards)), asker.session_hash or ""
    stop = page.runs.begin(session)
    try:
        try:
            request = await asyncio.to_thread(_judged, page, form, asker, owner)
        except UserError as problem:
            yield RunOutputs.refused(len(page.cards), problem)
            return
        plan = Plan(request, Pace(page.settings.cache_dir), page.settings.repeats)
        live = Live(request.cells, request.reference, request.model, plan)
        view.shown = Shown(running=request)
        view.draw(live, set(range(len(live.columns))))
        yield view.values(running=True)
        view.shown = gr.skip()
        background = Background(lambda emit: page.admission.run(request, owner_of(owner), stop, emit, asker))
        began = sent_at = time.monotonic()
        while True:
            ended = background.ended  # checked before draining, so that no event is lost
            events = [event for (event,) in background.drain()]
            moved = _take(live, events, view)
            if _tabs_may_draw(live, events):
                view.shown = Shown(live.so_far(request), running=request)
            plan.tick(time.monotonic())
            line = notice.render(live, stop.is_set(), time.monotonic() - began)
            if ended:
                break
            if moved or line != view.notice or time.monotonic() - sent_at > PULSE_S:
                view.notice, sent_at = line, time.monotonic()
                yield view.values()
                view.shown = gr.skip()
            await asyncio.sleep(TICK_S)
        if background.error is not None:
            view.notice = _explain(background.error)
            _settle(live, view, request)
        elif live.comparison is None:  # the ZeroGPU call ended before any column was complete
            view.notice = notice.say("Stopped.")
            _settle(live, view, request)
        else:
            view.notice, view.shown = line, page.admission.shown(live.comparison)
            if not stop.is_set():
                plan.pace.remember(request.model, plan.measured(), request.fidelity)
            saved = page.admission.holds(live.comparison.id)
            view.share = share.render(page, live.comparison, asker, saved=saved)
        yield view.values(running=False)
    except Exception as problem:  # otherwise Run would stay disabled until the page is loaded again
        view.notice, view.shown = _explain(problem), Shown()
        yield view.values(running=False)
    finally:
        stop.set()  # the visitor left: the generator was closed
        page.runs.end(session, stop)


def _judged(page: Page, form: Form, asker: gr.Request, owner: str) -> Request:
    """The request of a form, admitted. Beside the event loop: a form is as large as its sender likes."""
    request = form.request(
        page.settings.max_columns, lambda request: page.admission.admit(request, asker, owner)
    )
    return checked(request, page.settings)


def _take(live: Live, events: list[Event], view: RunOutputs) -> bool:
    """Apply events and redraw each changed card once; returns whether any changed."""
    changed: set[int] = set()
    for event in events:
        live.plan.apply(event, time.monotonic())
        changed |= live.apply(event)
    view.draw(live, changed)
    return bool(changed)


def _tabs_may_draw(live: Live, events: list[Event]) -> bool:
    """Whether the tabs are drawn with what has been measured so far: while the next column loads, and while columns are
    scored, when nothing is timed that drawing could disturb."""
    if live.comparison or not any(c.result and c.answered for c in live.columns):
        return False
    if any(not c.answered for c in live.columns):
        return any(isinstance(event, Generated) for event in events)
    first = not live.scoring
    live.scoring = live.scoring or any(isinstance(event, Scoring) for event in events)
    return live.scoring and (first or any(isinstance(event, Finished) for event in events))


def _settle(live: Live, view: RunOutputs, request: Request) -> None:
    """The whole run ended early: mark every unfinished card as stopped; the tabs keep what was measured."""
    view.shown = Shown(live.so_far(request) if any(c.answered for c in live.columns) else None)
    for column in live.columns:
        if not column.finished:
            column.state = "stopped"
    view.draw(live, set(range(len(live.columns))))


def _explain(error: BaseException) -> str:
    problem = explain(error, "finish the comparison")
    error_log.release(error)
    return notice.problem(problem)


def releaser(number: int, public: bool):
    """Unload the variant of card `number`, and show the freed memory on the card."""

    def release(shown: Shown):
        comparison = shown.comparison
        if public:  # another visitor may be using it
            return gr.skip(), residents.NOT_HERE
        if comparison is None or number >= len(comparison.cells):
            return gr.skip(), gr.skip()
        cell, engine = comparison.cells[number], get_engine()
        handle = engine.handle_of(comparison.model, cell.variant)
        back = engine.unload(handle) if handle else 0
        shown.unloaded[cell.label] = back
        live = Live.of(comparison, shown.recorded)
        return cards.render(live, live.columns[number], number, shown.unloaded), residents.freed_line(
            back, f"Unloaded {cell.label}"
        )

    return release
