"""The Train tab, during a run, as HTML: progress, figures, and sample answers before and now."""

from __future__ import annotations

from collections.abc import Iterable

from comparator.core.errors import UserError
from comparator.training.types import LossPoint, Sample, TrainingState
from comparator.ui.markup import code, esc, note, sized, table
from comparator.ui.results.notice import problem, say
from comparator.ui.train.preview import behind
from comparator.util import formatting

NOTHING = "Press Train to see the loss, the time left and a sample answer here. Closing the tab does not stop the training."
STATES = {
    "waiting": "Queued",
    "preparing": "Preparing",
    "training": "Training",
    "saving": "Saving",
    "finished": "Done",
    "stopped": "Stopped",
    "cancelled": "Stopped before the first step",
    "failed": "Failed",
    "interrupted": "Interrupted",
}


def line(state: TrainingState) -> str:
    """The state of a job as a sentence."""
    if state.status == "waiting":
        why = state.message.removeprefix("queued: ") or "the device is busy"
        return f"Queued: {why}. It starts automatically."
    if state.status == "training":
        remaining = f", {formatting.duration(state.eta_s)} left" if state.eta_s is not None else ""
        return f"Step {state.step:,} of {state.of:,}{remaining}"
    if state.status in ("preparing", "saving"):
        return state.message or f"{STATES[state.status]} …"
    if state.status == "finished":
        return f"Done: {formatting.plural(state.step, 'step')} in {formatting.duration(state.elapsed_s)}."
    done = f"after step {state.step:,}" + (f" of {state.of:,}" if state.of else "")
    if state.status == "stopped":
        return f"Stopped {done}. The adapter trained so far is kept."
    if state.status == "cancelled":
        return "Stopped before the first step; nothing was saved."
    checkpoint = (
        f" It can be resumed from the checkpoint at step {state.checkpoint_step:,}."
        if state.resumable
        else ""
    )
    if state.status == "interrupted":
        return f"Interrupted {done}: the program ended.{checkpoint}"
    return f"Failed {done}.{checkpoint}" if state.step else f"Failed.{checkpoint}"


def render(state: TrainingState | None) -> str:
    """Everything about a job except its curve and its samples."""
    if state is None:
        return note(esc(NOTHING))
    request = state.request
    title = (
        f'<p class="train-line"><b>{code(state.job)}</b> {esc(request.data.title)} on {code(request.base)} of '
        f"{esc(request.model)}</p>"
    )
    return f"{title}{_message(state)}{_bar(state)}{_figures(state)}"


def _message(state: TrainingState) -> str:
    if state.status == "failed" and state.error is not None:
        checkpoint = f" {line(state)}" if state.resumable else ""
        return problem(UserError(state.error.problem, f"{state.error.advice}{checkpoint}"))
    if state.stopping and not state.over:
        return say("Stopping after this step; the adapter trained so far is kept …")
    text = line(state)
    if state.status == "training":  # announced once, not at every step
        return say("Training.", text)
    return say(text)


def _bar(state: TrainingState) -> str:
    fraction = state.fraction
    if state.status in ("training", "saving", "stopped", "finished") and state.of:
        fraction = state.step / state.of
    if state.over:
        kind, width = "over", f"{(fraction or 0) * 100:.1f}"
    elif fraction is None or state.status == "waiting":
        kind, width = "moving", "30"
    else:
        kind, width = "", f"{min(1.0, fraction) * 100:.1f}"
    value = "" if fraction is None else f' aria-valuenow="{fraction * 100:.0f}"'
    return (
        f'<div class="train-bar progress {kind}" role="progressbar" aria-label="Progress of the training"'
        f'{value} aria-valuemin="0" aria-valuemax="100"><i style="width:{width}%"></i></div>'
    )


def _figures(state: TrainingState) -> str:
    losses = [p.loss for p in state.curve if p.loss is not None]
    eval_losses = [p.eval_loss for p in state.curve if p.eval_loss is not None]
    peak = "" if state.result is None or state.result.peak_bytes is None else "peak"
    memory = state.result.peak_bytes if peak else state.memory_bytes
    rows = (
        ("step", f"{state.step:,}" if state.of else formatting.NONE, f"of {state.of:,}" if state.of else ""),
        (
            "time left",
            formatting.duration(0 if state.over and state.of else state.eta_s),
            f"{formatting.duration(state.elapsed_s)} so far",
        ),
        ("loss", _loss(losses[-1:]), _from(losses)),
        ("evaluation loss", _loss(eval_losses[-1:]), _from(eval_losses)),
        ("speed", formatting.figure(state.tok_s, "tok/s"), "training throughput"),
        ("memory", formatting.megabytes(memory), peak or "in use"),
    )
    return '<dl class="train-tiles">' + "".join(
        f"<div><dt>{esc(n)}</dt><dd>{esc(v)}</dd><dd>{esc(w)}</dd></div>" for n, v, w in rows
    ) + "</dl>"  # fmt: skip


def _loss(last: list[float]) -> str:
    return formatting.small(last[0], 3) if last else formatting.NONE


def _from(values: list[float]) -> str:
    """The first value, and the ratio of the last to it."""
    if len(values) < 2:
        return "nats"
    return (
        f"from {formatting.small(values[0], 3)} {formatting.times(formatting.ratio(values[-1], values[0]))}"
    )


def samples(state: TrainingState | None) -> str:
    """The answers to the prompt before training and now, and those of earlier steps in a fold."""
    if state is None or not state.samples:
        if state is not None and not state.request.sample_prompt:
            return note("No sample answer: the prompt was empty.")
        if state is not None and state.over:
            return note("This run has no sample answer.")
        return note("The answers to the prompt above, before training and now, will appear here.")
    last = state.samples[-1]
    now = f"now, after step {last.step:,}" if last.step else "now: no step finished yet"
    return (
        f'<p class="train-line">{esc(last.prompt)}</p><div class="train-answers">{_answer("before", last.before)}'
        f"{_answer(now, last.now)}</div>{_between(state.samples)}"
    )


def _answer(title: str, text: str) -> str:
    shown = esc(text) if text.strip() else '<span class="empty">(an empty answer)</span>'
    return (
        f'<section class="train-answer" aria-label="Answer {esc(title)}"><h4>{esc(title)}</h4>'
        f'<div class="train-text" tabindex="0" role="region" aria-label="Answer {esc(title)}, text" dir="auto">'
        f"{shown}</div></section>"
    )


def _between(samples: tuple[Sample, ...]) -> str:
    later = [s for s in samples if s.step]
    if len(later) < 2:
        return ""
    items = "".join(
        f"<li><b>Step {s.step:,}</b> <span class='train-said' dir='auto'>{esc(s.now)}</span></li>"
        for s in later
    )
    return behind(f'<ol class="plain train-between">{items}</ol>', f"{len(later)} answers during training")


def curve_table(curve: Iterable[LossPoint], title: str) -> str:
    """The data of the loss curve as a table."""
    rows = [
        [
            sized(f"{p.step:,}", p.step),
            *(
                "" if value is None else sized(f"{value:.4f}", value)
                for value in (p.loss, p.eval_loss)
            ),
            "" if p.learning_rate is None else sized(f"{p.learning_rate:.3g}", p.learning_rate),
        ]
        for p in curve
    ]  # fmt: skip
    heads = (
        ("Step", ""),
        ("Loss", "nats, mean over the step's batches"),
        ("Evaluation loss", "nats, over the held-out samples"),
        ("Learning rate", ""),
    )
    return (
        behind(table(heads, rows, caption=f"{title}: loss by step", numeric=range(4), name="loss"))
        if rows
        else ""
    )
