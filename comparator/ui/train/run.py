"""The Train tab: Train, Stop, Resume, and the progress of a job.

The job itself belongs to `training.registry`; the page polls its state once a second while one is running and sends what
changed. So closing the tab does not stop it, and every page that is opened shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from comparator.core.errors import UserError
from comparator.reporting.plots import training
from comparator.store.links import parse_query_string
from comparator.training.types import TrainingState
from comparator.ui import links
from comparator.ui.page import DIRECT, PRIVATE, Page, html, picture
from comparator.ui.results.notice import problem, say
from comparator.ui.train import progress as train_progress
from comparator.ui.train import status as train_status
from comparator.ui.train import trained
from comparator.ui.train.setup import SetupFields
from comparator.ui.train.trained import TrainedPanel


@dataclass(frozen=True)
class Watched:
    """What a page shows: the job, and how much of it was sent."""

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
    """The components that show a job, in the order of `values`."""

    status: gr.HTML
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


SKIPPED = 11  # number of values of `Watch.outputs`


def build(page: Page) -> Watch:
    with gr.Row(elem_classes="train-actions"):
        train = gr.Button("Train", variant="primary", elem_id="train-run", scale=0)
        stop = gr.Button("Stop", elem_id="train-stop", interactive=False, scale=0)
        resume = gr.Button("Resume from checkpoint", elem_id="train-resume", visible=False, scale=0)
        forget = gr.Button("Discard this run", elem_id="train-forget", visible=False, scale=0)
        status = html(say(""), elem_id="train-said")
    progress = html(train_progress.render(None), elem_id="train-progress")
    with gr.Row(elem_classes="plots"):
        with gr.Column():
            curve = picture("Loss", empty="Press Train to see the loss after each step.")
            table = html()
        with gr.Column(elem_classes="picture"):
            html("<h3>A sample answer</h3>")
            samples = html(train_progress.samples(None), elem_id="train-samples")
    return Watch(status, progress, curve, table, samples, train, stop, resume, forget, gr.State(Watched()))


def wire(
    page: Page, tab: gr.Tab, setup_fields: SetupFields, watch: Watch, panel: TrainedPanel, demo: gr.Blocks
) -> None:
    own, results = watch.outputs(page), panel.outputs(page)
    inputs_now = [watch.watched, *panel.inputs(page)]

    def start(request: gr.Request, owner: str, *values: Any) -> Iterator[list[Any]]:
        def work(mine: Any, visitor: str) -> str:
            page.admission.count(request)
            return mine.start(setup_fields.read(values).request(), visitor=visitor)

        yield from began(page, owner, request, work)

    def again(request: gr.Request, watched: Watched, owner: str) -> Iterator[list[Any]]:
        yield from began(page, owner, request, lambda mine, visitor: mine.resume(watched.job, visitor))

    def tick(watched: Watched, *inputs: Any) -> list[Any]:
        return followed(page, watched, inputs)

    def arrive(request: gr.Request, *inputs: Any) -> list[Any]:
        return arrived(page, request, inputs[1:])

    def opened(watched: Watched, *inputs: Any) -> list[Any]:
        return followed(page, replace(watched, version=-1), inputs, latest=True)

    def away(watched: Watched, *inputs: Any) -> list[Any]:
        return forgotten(page, watched, inputs)

    def halt(watched: Watched, owner: str) -> str:
        return stopped(page.admission.trainings(owner), watched)

    gr.on(
        [watch.train.click], start, inputs=[page.owner, *setup_fields.inputs(page)],
        outputs=[watch.status, *own], trigger_mode="once", **PRIVATE,
    )  # fmt: skip
    watch.resume.click(
        again,
        inputs=[watch.watched, page.owner],
        outputs=[watch.status, *own],
        trigger_mode="once",
        **PRIVATE,
    )
    watch.stop.click(halt, inputs=[watch.watched, page.owner], outputs=[watch.status], **DIRECT)
    watch.forget.click(away, inputs=inputs_now, outputs=[watch.status, *own, *results], **PRIVATE)
    # One at a time: a late response must not overwrite the next.
    page.training_clock.tick(tick, inputs=inputs_now, outputs=[*own, *results], trigger_mode="once", **DIRECT)
    tab.select(opened, inputs=inputs_now, outputs=[*own, *results], **DIRECT)
    # On a public server what is shown is the visitor's, whose key the browser sends once the page is there.
    came = page.owner.change if page.settings.public else demo.load
    came(arrive, inputs=inputs_now, outputs=[*own, *results], **DIRECT)


# ---------------------------------------------------------------- what is sent


def began(page: Page, owner: Any, asker: Any, work: Callable[[Any, str], str]) -> Iterator[list[Any]]:
    """Start or resume with `work(the visitor's trainings, whose turn it is)`; yields values of (status, *watch). Nothing
    else changes if that fails."""
    nothing = [gr.skip()] * SKIPPED
    yield [say("Starting …"), *nothing]
    try:
        mine = page.admission.trainings(owner)
        state = mine.snapshot(work(mine, page.admission.visitor(asker)))
    except UserError as error:
        yield [problem(error), *nothing]
        return
    yield [say(""), *values(state, Watched())]


def stopped(mine: Any, watched: Watched) -> str:
    try:
        mine.stop(watched.job)
    except UserError as error:
        return problem(error)
    return say("Stopping …")


def forgotten(page: Page, watched: Watched, inputs: tuple[Any, ...]) -> list[Any]:
    """Values of (line, *watch, *trained)."""
    try:
        page.admission.trainings(inputs[-1]).forget(watched.job)
    except UserError as error:
        return [problem(error), *([gr.skip()] * (SKIPPED + trained.OUTPUTS))]
    return [say("Discarded."), *followed(page, Watched(), inputs, latest=True)]


def followed(page: Page, watched: Watched, inputs: tuple[Any, ...], latest: bool = False) -> list[Any]:
    """What changed in the job that this page shows, and the list of results if it has just ended.

    Returns values of (*watch, *trained); `inputs` are those of `TrainedPanel.inputs`. `latest`: show the running or newest
    job, and the results in any case.
    """
    mine = page.admission.trainings(inputs[-1])
    try:
        state = newest(mine) if latest or not watched.job else mine.snapshot(watched.job)
    except UserError:
        state = newest(mine)  # it was discarded on another page
    if state is None:
        discarded = [
            "",
            gr.Timer(active=False),
            train_progress.render(None),
            gr.skip(),
            "",
            train_progress.samples(None),
        ]
        return [*discarded, *_buttons(None), Watched(), *trained.values(page, inputs)]
    ended = state.over and not (watched.over and watched.job == state.job)
    new_adapter = state.result.name if state.result and ended and not latest else ""
    results = trained.values(page, inputs, new_adapter) if ended or latest else [gr.skip()] * trained.OUTPUTS
    return [*values(state, watched), *results]


def newest(mine: Any) -> TrainingState | None:
    """The running job, else the newest one, else None."""
    return mine.running() or next(iter(mine.jobs()), None)


def arrived(page: Page, asker: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """A page was opened: the current job, and the adapters trained here."""
    values_now = followed(page, Watched(), inputs, latest=True)
    if _filled(asker):  # the link fills in the list of adapters, these included
        values_now[-2:] = [gr.skip(), gr.skip()]
    return values_now


def _filled(asker: Any) -> bool:
    try:
        return parse_query_string(links.query_of(asker)) is not None
    except UserError:
        return False


def values(state: TrainingState, watched: Watched) -> list[Any]:
    """What changed since `watched`, in the order of `Watch.outputs`."""
    now = Watched.of(state)
    if now == watched:
        return [gr.skip()] * SKIPPED
    same = watched.job == now.job and watched.version >= 0
    grown = not same or watched.points != now.points or now.over
    new_samples = not same or watched.samples != now.samples or now.over
    curve = training.loss_curve(state.curve, state.of) if grown else gr.skip()
    table = train_progress.curve_table(state.curve, state.job) if grown else gr.skip()
    return [
        train_status.banner(state),
        gr.Timer(active=not state.over),
        train_progress.render(state),
        curve,
        table,
        train_progress.samples(state) if new_samples else gr.skip(),
        *_buttons(state),
        now,
    ]


def _buttons(state: TrainingState | None) -> list[Any]:
    """Updates of Train, Stop, Resume and Discard."""
    going = state is not None and not state.over
    resumable = state is not None and state.resumable
    broken = state is not None and state.status in ("failed", "interrupted")
    return [
        gr.Button(interactive=not going),
        gr.Button(interactive=going and not state.stopping),
        gr.Button(visible=resumable),
        gr.Button(visible=broken),
    ]
