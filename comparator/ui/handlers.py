"""What happens when a visitor presses Run, Stop or Unload, opens the page or closes it.

Run streams: the engine's events arrive on a thread of their own and are gathered here a few times a second, so the
engine never waits for the page, and the page gets only what changed. Knows nothing of how a card looks.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

import gradio as gr

from comparator import lend
from comparator.types import Event, Problem
from comparator.ui import links
from comparator.ui.components import cards, header, notice, residents, share, summary
from comparator.ui.desk import owner_of
from comparator.ui.live import Live
from comparator.ui.page import DIRECT, PRIVATE, Page
from comparator.ui.state import Form, Shown

# How often the page may change. Every update takes some 1.5 ms of a core; where there are few, the model needs them.
TICK_S = 0.1 if (os.cpu_count() or 1) > 4 else 0.2
PULSE_S = 1.0  # how often it is sent something even if nothing changed: that is how a lost visitor is noticed


class Pump:
    """Runs a blocking iterator on its own thread; `drain` takes what has come so far and never waits."""

    def __init__(self, events: Iterator[Event]):
        self._events, self._arrived = events, deque()
        self.error: BaseException | None = None
        self.ended = threading.Event()
        context = contextvars.copy_context()  # who asks: ZeroGPU lends to a visitor, not to a thread
        threading.Thread(target=context.run, args=(self._work,), name="page-events", daemon=True).start()

    def _work(self) -> None:
        try:
            for event in self._events:
                self._arrived.append(event)
        except BaseException as error:  # told to the visitor by whoever drains
            self.error = error
        finally:
            self.ended.set()

    def drain(self) -> list[Event]:
        return [self._arrived.popleft() for _ in range(len(self._arrived))]


class Screen:
    """The outputs of a run, in the order in which Gradio wants them.

    What did not change is sent as the very same value, which Gradio's diff reduces to nothing. `gr.skip()` and
    `gr.update()` would make it build the component anew each time, so they stand only in the first and last yield.
    """

    recording, share = "", ""  # while a comparison runs there is nothing to share yet

    def __init__(self, slots: int):
        self.cards: list[Any] = [""] * slots
        self.summary: Any = ""
        self.notice = notice.say("Starting …")
        self.shown: Any = gr.skip()  # a State: skipping it costs nothing

    def values(self, running: bool | None = None) -> list[Any]:
        """`running` says whether Run or Stop can be pressed; None leaves the buttons as they are."""
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
    def refused(cls, slots: int, problem: Problem) -> list[Any]:
        """Only the line under Run changes; what an earlier run showed stays."""
        screen = cls(slots)
        screen.cards, screen.summary = [gr.skip()] * slots, gr.skip()
        screen.recording = screen.share = gr.skip()
        screen.notice = notice.problem(problem)
        return screen.values(running=False)


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
        async for screen in stream(page, form, request, owner):
            yield screen

    async def stop(request: gr.Request) -> str:
        going = page.runs.stop(request.session_hash)
        return notice.say("Stopping …" if going else "Nothing is running.")

    async def left(request: gr.Request) -> None:
        page.runs.stop(request.session_hash)
        page.parts.stop(request.session_hash)
        page.evaluations.stop(request.session_hash)

    started = gr.on(
        [page.run.click, page.fields["prompt"].submit],
        run,
        inputs=[page.owner, *page.fields.values()],
        outputs=outputs(page),
        # Values go out as they are: HTML that is ready. Gradio's own pass over every output would cost a thread
        # hop each, ten times a second.
        postprocess=False,
        trigger_mode="once",
        **PRIVATE,
    )
    page.refresh_history(started.then(around, outputs=[page.status, page.residents], **DIRECT))
    page.stop.click(stop, outputs=[page.notice], **DIRECT)
    demo.unload(left)
    gr.Timer(header.REFRESH_S).tick(around, outputs=[page.status, page.residents], **DIRECT)
    demo.load(around, outputs=[page.status, page.residents], **DIRECT)
    # One listener for both, so that the first look's answer never comes after that of what was typed meanwhile.
    gr.on(
        [demo.load, page.fields["model"].change],
        page.describe,
        inputs=[page.fields["model"]],
        outputs=[page.facts],
        trigger_mode="always_last",
        **PRIVATE,
    )
    links.wire(page, demo)

    page.unload_all.click(residents.unloader(page.settings.public), outputs=[page.came_back], **PRIVATE).then(
        around, outputs=[page.status, page.residents], **DIRECT
    )
    for number, card in enumerate(page.cards):
        card.release(
            releaser(number, page.settings.public),
            inputs=[page.shown],
            outputs=[card, page.came_back],
            **PRIVATE,
        ).then(around, outputs=[page.status, page.residents], **DIRECT)


def around():
    """The device and what it holds, as they are now."""
    return header.current(), residents.current()


async def stream(page: Page, form: Form, asker: gr.Request, owner: str = "") -> AsyncIterator[list[Any]]:
    """One run, from the filled-in form to the last card; yields `outputs`. Ends early when the visitor leaves."""
    screen, session = Screen(len(page.cards)), asker.session_hash or ""
    stop = page.runs.begin(session)
    try:
        try:
            request = form.request(page.settings.max_columns)
            page.desk.admit(request, asker)
            events = page.desk.keep(request, lend.compare(request, stop), owner_of(owner))
        except Problem as problem:
            yield Screen.refused(len(page.cards), problem)
            return
        live = Live(request.cells, request.reference, request.model)
        live.repeats = request.settings.repeats
        screen.draw(live, set(range(len(live.columns))))
        yield screen.values(running=True)
        pump, began, said = Pump(events), time.monotonic(), time.monotonic()
        while True:
            ended = pump.ended.is_set()  # asked before draining, so that nothing is left behind
            moved = _take(live, pump.drain(), screen)
            line = notice.render(live, stop.is_set(), time.monotonic() - began)
            if ended:
                break
            if moved or line != screen.notice or time.monotonic() - said > PULSE_S:
                screen.notice, said = line, time.monotonic()
                yield screen.values()
            await asyncio.sleep(TICK_S)
        if pump.error is not None:
            screen.notice = _explain(pump.error)
            _settle(live, screen)
        elif live.comparison is None:  # a lent device was given back before anything was complete
            screen.notice = notice.say("Stopped.")
            _settle(live, screen)
        else:
            screen.notice, screen.shown = line, Shown(live.comparison)
            saved = page.desk.holds(live.comparison.id)
            screen.share = share.render(page, live.comparison, asker, saved=saved)
        yield screen.values(running=False)
    finally:
        stop.set()  # a visitor who left: the generator was closed in the middle
        page.runs.end(session, stop)


def _take(live: Live, events: list[Event], screen: Screen) -> bool:
    """Apply what arrived and draw each card that changed, once; whether any did."""
    changed: set[int] = set()
    for event in events:
        changed |= live.apply(event)
    screen.draw(live, changed)
    return bool(changed)


def _settle(live: Live, screen: Screen) -> None:
    """The run broke off as a whole: no card may look as if it were still at work."""
    for column in live.columns:
        if not column.finished:
            column.state = "stopped"
    screen.draw(live, set(range(len(live.columns))))


def _explain(error: BaseException) -> str:
    if isinstance(error, Problem):
        return notice.problem(error)
    return notice.problem(
        Problem(
            f"The comparison broke off: {type(error).__name__}: {error}".strip(),
            "Press Run to try again. If it happens again, please report it with these words.",
        )
    )


def releaser(number: int, public: bool):
    """Unload the variant of card `number`; show the memory that came back on the card itself."""

    def release(shown: Shown):
        comparison = shown.comparison
        if public:  # the next visitor may be using it
            return gr.skip(), residents.NOT_HERE
        if comparison is None or number >= len(comparison.cells):
            return gr.skip(), gr.skip()
        from comparator.engine import get_engine

        cell, engine = comparison.cells[number], get_engine()
        handle = engine.handle_of(comparison.model, cell.variant)
        back = engine.unload(handle) if handle else 0
        shown.unloaded[cell.label] = back
        live = Live.of(comparison, shown.recorded)
        return cards.render(live, live.columns[number], number, shown.unloaded), residents.said(
            back, f"Unloaded {cell.label}"
        )

    return release
