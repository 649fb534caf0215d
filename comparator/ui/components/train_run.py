"""The Train tab: Train, Stop, and following a run from wherever one comes.

The run itself belongs to `training.jobs`; the page only asks how it stands, once a second while one is under way, and
sends what changed. So a closed tab stops nothing, and any page that opens finds it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from comparator import plots_training
from comparator.share import parse_query_string
from comparator.training import jobs
from comparator.training.types import TrainingState
from comparator.types import Problem
from comparator.ui import links
from comparator.ui.components import train_after, train_watch
from comparator.ui.components.notice import problem, say
from comparator.ui.components.train_after import After
from comparator.ui.components.train_before import Asking
from comparator.ui.page import DIRECT, PRIVATE, Page, picture


@dataclass(frozen=True)
class Watched:
    """What a page has been shown last: the run, and how far it had come."""

    job: str = ""
    version: int = -1
    points: int = 0
    samples: int = 0
    over: bool = False

    @classmethod
    def of(cls, state: TrainingState) -> Watched:
        return cls(state.job, state.version, len(state.curve), len(state.samples), state.over)


@dataclass
class Watch:
    """Where a run appears, in the order of `values`."""

    said: gr.HTML
    progress: gr.HTML
    curve: gr.Plot
    table: gr.HTML
    samples: gr.HTML
    train: gr.Button
    stop: gr.Button
    resume: gr.Button
    forget: gr.Button
    watched: gr.State

    def outputs(self, page: Page) -> list[Any]:
        own = [self.progress, self.curve, self.table, self.samples]
        buttons = [self.train, self.stop, self.resume, self.forget]
        return [page.training, page.training_clock, *own, *buttons, self.watched]


SKIPPED = 11  # outputs of a watch


def build(page: Page) -> Watch:
    with gr.Row(elem_classes="train-actions"):
        train = gr.Button("Train", variant="primary", elem_id="train-run", scale=0)
        stop = gr.Button("Stop", elem_id="train-stop", interactive=False, scale=0)
        resume = gr.Button("Go on from the checkpoint", elem_id="train-resume", visible=False, scale=0)
        forget = gr.Button("Throw this run away", elem_id="train-forget", visible=False, scale=0)
        said = gr.HTML(say(""), elem_id="train-said", apply_default_css=False)
    progress = gr.HTML(train_watch.render(None), elem_id="train-progress", apply_default_css=False)
    with gr.Row(elem_classes="plots"):
        with gr.Column():
            curve = picture("Loss")
            table = gr.HTML("", apply_default_css=False)
        with gr.Column(elem_classes="picture"):
            gr.HTML("<h3>A sample answer</h3>", apply_default_css=False)
            samples = gr.HTML(train_watch.samples(None), elem_id="train-samples", apply_default_css=False)
    return Watch(said, progress, curve, table, samples, train, stop, resume, forget, gr.State(Watched()))


def wire(page: Page, tab: gr.Tab, asking: Asking, watch: Watch, after: After, demo: gr.Blocks) -> None:
    own, results = watch.outputs(page), after.outputs(page)
    known = [watch.watched, *after.inputs(page)]

    def start(watched: Watched, *values: Any) -> Iterator[list[Any]]:
        def work() -> str:
            return jobs.get_trainings().start(asking.read(values).request())

        yield from began(work)

    def again(watched: Watched) -> Iterator[list[Any]]:
        yield from began(lambda: jobs.get_trainings().resume(watched.job))

    def tick(watched: Watched, *left: Any) -> list[Any]:
        return followed(watched, left)

    def arrive(request: gr.Request, *left: Any) -> list[Any]:
        return arrived(request, left[1:])

    def opened(watched: Watched, *left: Any) -> list[Any]:
        return followed(replace(watched, version=-1), left, latest=True)

    def away(watched: Watched, *left: Any) -> list[Any]:
        return forgotten(watched, left)

    gr.on(
        [watch.train.click], start, inputs=[watch.watched, *asking.inputs(page)],
        outputs=[watch.said, *own], trigger_mode="once", **PRIVATE,
    )  # fmt: skip
    watch.resume.click(
        again, inputs=[watch.watched], outputs=[watch.said, *own], trigger_mode="once", **PRIVATE
    )
    watch.stop.click(stopped, inputs=[watch.watched], outputs=[watch.said], **DIRECT)
    watch.forget.click(away, inputs=known, outputs=[watch.said, *own, *results], **PRIVATE)
    # One at a time: an answer that is late must not overtake the next.
    page.training_clock.tick(tick, inputs=known, outputs=[*own, *results], trigger_mode="once", **DIRECT)
    tab.select(opened, inputs=known, outputs=[*own, *results], **DIRECT)
    demo.load(arrive, inputs=known, outputs=[*own, *results], **DIRECT)


# ---------------------------------------------------------------- what is sent


def began(work) -> Iterator[list[Any]]:
    """Start or resume; values of (line, *watch). What the fields hold and what is shown stays when it is refused."""
    nothing = [gr.skip()] * SKIPPED
    yield [say("Starting …"), *nothing]
    try:
        state = jobs.get_trainings().snapshot(work())
    except Problem as wrong:
        yield [problem(wrong), *nothing]
        return
    yield [say(""), *values(state, Watched())]


def stopped(watched: Watched) -> str:
    try:
        jobs.get_trainings().stop(watched.job)
    except Problem as wrong:
        return problem(wrong)
    return say("Stopping …")


def forgotten(watched: Watched, left: tuple[Any, ...]) -> list[Any]:
    """Values of (line, *watch, *after)."""
    try:
        jobs.get_trainings().forget(watched.job)
    except Problem as wrong:
        return [problem(wrong), *([gr.skip()] * (SKIPPED + train_after.SHOWN))]
    return [say("Thrown away."), *followed(Watched(), left, latest=True)]


def followed(watched: Watched, left: tuple[Any, ...], latest: bool = False) -> list[Any]:
    """How the run stands that this page follows: what changed since, and, when it has just ended, the results anew.
    Values of (*watch, *after); `left` are those of `After.inputs`. `latest`: of several, the one under way, else the
    newest; and the results in any case."""
    try:
        state = newest() if latest or not watched.job else jobs.get_trainings().snapshot(watched.job)
    except Problem:
        state = newest()  # it was thrown away from another page
    if state is None:
        gone = [
            "",
            gr.Timer(active=False),
            train_watch.render(None),
            gr.skip(),
            "",
            train_watch.samples(None),
        ]
        return [*gone, *_buttons(None), Watched(), *train_after.values(left)]
    ended = state.over and not (watched.over and watched.job == state.job)
    made = state.result.name if state.result and ended and not latest else ""
    results = train_after.values(left, made) if ended or latest else [gr.skip()] * train_after.SHOWN
    return [*values(state, watched), *results]


def newest() -> TrainingState | None:
    """The run under way, else the last one there was."""
    trainings = jobs.get_trainings()
    return trainings.running() or next(iter(trainings.jobs()), None)


def arrived(asker: Any, left: tuple[Any, ...]) -> list[Any]:
    """A page was opened: the run it finds, and the adapters that were trained here."""
    found = followed(Watched(), left, latest=True)
    if _filled(asker):  # the link fills the list of adapters in, with these in it
        found[-2:] = [gr.skip(), gr.skip()]
    return found


def _filled(asker: Any) -> bool:
    try:
        return parse_query_string(links.query_of(asker)) is not None
    except Problem:
        return False


def values(state: TrainingState, watched: Watched) -> list[Any]:
    """What changed since `watched`, in the order of `Watch.outputs`."""
    now = Watched.of(state)
    if now == watched:
        return [gr.skip()] * SKIPPED
    same = watched.job == now.job and watched.version >= 0
    grown = not same or watched.points != now.points or now.over
    spoken = not same or watched.samples != now.samples or now.over
    curve = plots_training.loss_curve(state.curve, state.of) if grown else gr.skip()
    table = train_watch.curve_table(state.curve, state.job) if grown else gr.skip()
    return [
        train_watch.banner(state),
        gr.Timer(active=not state.over),
        train_watch.render(state),
        curve,
        table,
        train_watch.samples(state) if spoken else gr.skip(),
        *_buttons(state),
        now,
    ]


def _buttons(state: TrainingState | None) -> list[Any]:
    """Train, Stop, Go on, Throw away."""
    going = state is not None and not state.over
    resumable = state is not None and state.resumable
    broken = state is not None and state.status in ("failed", "interrupted")
    return [
        gr.Button(interactive=not going),
        gr.Button(interactive=going and not state.stopping),
        gr.Button(visible=resumable),
        gr.Button(visible=broken),
    ]
