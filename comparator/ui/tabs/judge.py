"""A judge model, at the end of the Votes tab: it compares the answers in both orders, beside the human votes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import gradio as gr

from comparator import api, sources
from comparator.comparison import judge as judging
from comparator.comparison.judge import NEW_TOKENS, Judging
from comparator.core.endpoints import parse_endpoints
from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings, Request
from comparator.core.result import Comparison
from comparator.core.settings import Settings
from comparator.core.votes import Judge
from comparator.engines import get_engine
from comparator.reporting import votes
from comparator.store.voting import change_votes
from comparator.ui.form import Shown
from comparator.ui.markup import esc, note, render
from comparator.ui.page import DIRECT, PRIVATE, Choice, Page, html
from comparator.ui.progress import batches, broken_off, run_buttons, running_line
from comparator.ui.results.notice import problem, say
from comparator.ui.tabs.rates import rates_table, text_table
from comparator.util.streams import Background

WHY = (
    "Any variant, or a server, decides which of two answers is better, twice with the order of the answers swapped. If "
    "the two verdicts disagree, the pair is a tie. It needs a model that follows instructions: the built-in one is too "
    "small."
)
NOT_HERE = (
    "Judges do not run on a public server. Save the comparison as JSON and run python -m comparator judge on your own "
    "machine; "
    "open it here again to see the verdicts."
)


def build(page: Page) -> None:
    with gr.Column(visible=False, elem_id="judge") as whole:
        html(f"<h3>A judge model</h3>{note(esc(NOT_HERE if page.settings.public else WHY))}")
        with gr.Row(elem_classes="controls judge-controls", visible=not page.settings.public):
            column = Choice([], label="Judge", filterable=False, elem_id="judge-column")
            model = gr.Textbox(
                "", label="Its model", placeholder="the comparison's", max_lines=1, elem_id="judge-model"
            )
            start = gr.Button("Judge", size="sm", scale=0, elem_id="judge-run")
            stop = gr.Button("Stop", size="sm", scale=0, interactive=False, elem_id="judge-stop")
        status = html(say(""), elem_id="judge-status")
        results = html(elem_id="judge-results")

    async def run(request: gr.Request, shown: Shown, label: str, name: str) -> AsyncIterator[list[Any]]:
        async for values in stream(page, shown, label, name, request):
            yield values

    async def halt(request: gr.Request) -> None:
        page.judge_runs.stop(request.session_hash)

    page.on_comparison(lambda shown: offer(page, shown), [whole, column, status, results])
    start.click(
        run, inputs=[page.shown, column, model], outputs=[status, start, stop, results], trigger_mode="once", **PRIVATE
    )  # fmt: skip
    stop.click(halt, **DIRECT)


def offer(page: Page, shown: Shown):
    """(the section, the judges to choose from, an empty status, what earlier judges said)."""
    comparison = shown.comparison
    if comparison is None or len(comparison.cells) < 2 or not page.admission.holds(comparison.id):
        return gr.Column(visible=False), gr.skip(), say(""), ""
    names = choices(comparison, page.settings)
    return gr.Column(visible=True), gr.Dropdown(names, value=names[0]), say(""), results_of(comparison)


def choices(comparison: Comparison, settings: Settings) -> list[str]:
    """Servers first, which may be large, then the columns that answered."""
    try:
        servers = [f"endpoint@{name}" for name in parse_endpoints(settings.endpoints)]
    except UserError:  # the variants' list says what is wrong with the setting
        servers = []
    labels = [cell.label for cell in comparison.cells if cell.status == "ok"]
    return list(dict.fromkeys((*servers, *labels)))


def judging_of(page: Page, shown: Shown, label: Any, name: Any) -> tuple[Comparison, Judging]:
    """What was asked for. Raises `UserError` if it makes no sense, before anything is loaded."""
    comparison = shown.comparison
    if page.settings.public:
        raise UserError("Judges do not run on a public server.", NOT_HERE)
    if comparison is None or not page.admission.holds(comparison.id):
        raise UserError("There is no saved comparison to judge.", "Press Run, or open one.")
    if not isinstance(label, str) or not label:
        raise UserError("No judge is selected.", "Select one from the list.")
    model = str(name or "").strip()[:300] or comparison.model
    if shown.recorded and model == comparison.model and not sources.is_here(model, settings=page.settings):
        raise UserError(
            f"This is a saved comparison, and its model {model} is not on this machine.",
            "Name another model for the judge, or press “Run it here” above, which downloads it.",
        )
    return comparison, Judging(model, api.cell(label))


async def stream(page: Page, shown: Shown, label: Any, name: Any, asker: Any) -> AsyncIterator[list[Any]]:
    """One judging; yields values of (status, Judge, Stop, results). Ends early when the visitor leaves; what was judged
    until then is kept."""
    session = getattr(asker, "session_hash", None) or ""
    try:
        comparison, wanted = judging_of(page, shown, label, name)
        settings = GenerationSettings(max_new_tokens=NEW_TOKENS, repeats=1)
        request = Request(wanted.model, (wanted.cell,), "", settings=settings, fidelity="none")
        page.admission.admit(request, asker)
    except UserError as error:
        yield [problem(error), *run_buttons(False), gr.skip()]
        return
    stop = page.judge_runs.begin(session)

    def keep(judge: Judge) -> None:
        change_votes(page.admission.store, comparison.id, lambda now: judging.with_judge(now, judge))

    def work(emit) -> None:
        keep(
            judging.judge(
                comparison, wanted, engine=get_engine(), cancel=stop, on_progress=emit, on_judge=keep
            )
        )

    try:
        line = say("Starting …")
        yield [line, *run_buttons(True), gr.skip()]
        background = Background(work)
        async for emitted in batches(background, stop):
            for fraction, message in emitted:
                line = running_line(fraction, message)
            yield [say("Stopping …") if stop.is_set() else line, gr.skip(), gr.skip(), gr.skip()]
        now = shown.comparison
        over = (
            say("Done.") if background.error is None else broken_off(background.error, "The judge", "Judge")
        )
        yield [over, *run_buttons(False), results_of(now) if now else gr.skip()]
    finally:
        stop.set()  # the visitor left: the generator was closed
        page.judge_runs.end(session, stop)


def results_of(comparison: Comparison) -> str:
    """What each judge said: rates, agreement with people, and its reasons; "" without one."""
    judges = comparison.votes.judges if comparison.votes else ()
    if not judges:
        return ""
    parts = []
    for number, judge in enumerate(reversed(judges)):
        rows = votes.judge_totals(comparison, judge)
        rates = rates_table(comparison, rows, votes.judge_title(judge), f"judge-{number}") if rows else ""
        reasons = text_table(
            votes.REASONS_HEAD,
            votes.reason_rows(comparison, judge),
            "Its reasons for every pair",
            f"reasons-{number}",
        )
        parts.append(
            render(
                "judge.html", title=votes.judge_title(judge) if not rows else "", rates=rates,
                sentences=votes.judge_sentences(comparison, judge), reasons=reasons, instructions=judge.instructions,
            )
        )  # fmt: skip
    return "".join(parts) + note(esc(votes.JUDGE_RULE))
