"""The Train tab, while a run goes on: how far it is, what it costs, and what the model says before and now. As HTML."""

from __future__ import annotations

from collections.abc import Iterable

from comparator import words
from comparator.training.types import LossPoint, Sample, TrainingState
from comparator.types import Problem
from comparator.ui.components.notice import problem, say
from comparator.ui.components.train_data import behind
from comparator.ui.markup import code, esc, note, sized, table

NOTHING = "Press Train: the loss, the time left and a sample answer appear here. A closed tab stops nothing."
STATES = {
    "waiting": "Waiting",
    "preparing": "Preparing",
    "training": "Training",
    "saving": "Saving",
    "finished": "Done",
    "stopped": "Stopped",
    "cancelled": "Stopped before the first step",
    "failed": "Failed",
    "interrupted": "Broken off",
}


def duration(seconds: float | None) -> str:
    """As a person would say it: 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds is None:
        return words.NONE
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 and rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min"


def line(state: TrainingState) -> str:
    """What goes on, in a sentence."""
    if state.status == "waiting":
        why = state.message.removeprefix("waiting: ") or "the device is busy"
        return f"Waiting: {why}. It starts by itself."
    if state.status == "training":
        left = f", {duration(state.eta_s)} left" if state.eta_s is not None else ""
        return f"Step {state.step:,} of {state.of:,}{left}"
    if state.status in ("preparing", "saving"):
        return state.message or f"{STATES[state.status]} …"
    if state.status == "finished":
        return f"Done: {words.plural(state.step, 'step')} in {duration(state.elapsed_s)}."
    done = f"after step {state.step:,}" + (f" of {state.of:,}" if state.of else "")
    if state.status == "stopped":
        return f"Stopped {done}. What was trained until then is kept."
    if state.status == "cancelled":
        return "Stopped before the first step, so nothing was kept."
    kept = (
        f" The checkpoint of step {state.checkpoint_step:,} is there to go on from."
        if state.resumable
        else ""
    )
    if state.status == "interrupted":
        return f"The program ended while this was trained, {done}.{kept}"
    return f"Failed {done}.{kept}" if state.step else f"Failed.{kept}"


def banner(state: TrainingState | None) -> str:
    """The line that stands above the results, whichever tab is open, as long as something is being trained."""
    if state is None or state.over:
        return ""
    text = "Stopping …" if state.stopping else line(state)
    # Only the name is announced: the step changes every second.
    return (
        f'<div class="train-banner"><p role="status"><b>Training {code(state.job)}</b></p>'
        f'<p aria-hidden="true">{esc(text)}</p><button type="button" class="tool" data-tab="Train">Show</button></div>'
    )


def render(state: TrainingState | None) -> str:
    """Everything about a run but its curve and its samples."""
    if state is None:
        return note(esc(NOTHING))
    request = state.request
    title = (
        f'<p class="train-line"><b>{code(state.job)}</b> {esc(request.data.title)} on {code(request.base)} of '
        f"{esc(request.model)}</p>"
    )
    return f"{title}{_said(state)}{_bar(state)}{_figures(state)}"


def _said(state: TrainingState) -> str:
    if state.status == "failed" and state.error is not None:
        kept = f" {line(state)}" if state.resumable else ""
        return problem(Problem(state.error.problem, f"{state.error.advice}{kept}"))
    if state.stopping and not state.over:
        return say("Stopping after this step; what is trained so far is kept …")
    text = line(state)
    if state.status == "training":  # read out once, not at every step
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
    held = [p.eval_loss for p in state.curve if p.eval_loss is not None]
    peak = "" if state.result is None or state.result.peak_bytes is None else "at the peak"
    memory = state.result.peak_bytes if peak else state.memory_bytes
    rows = (
        ("step", f"{state.step:,}" if state.of else words.NONE, f"of {state.of:,}" if state.of else ""),
        (
            "time left",
            duration(0 if state.over and state.of else state.eta_s),
            f"{duration(state.elapsed_s)} so far",
        ),
        ("loss", _loss(losses[-1:]), _from(losses)),
        ("evaluation loss", _loss(held[-1:]), _from(held)),
        ("speed", words.figure(state.tok_s, "tok/s"), "tokens that went through"),
        ("memory", words.megabytes(memory), peak or "in use"),
    )
    return '<dl class="train-tiles">' + "".join(
        f"<div><dt>{esc(n)}</dt><dd>{esc(v)}</dd><dd>{esc(w)}</dd></div>" for n, v, w in rows
    ) + "</dl>"  # fmt: skip


def _loss(last: list[float]) -> str:
    return words.small(last[0], 3) if last else words.NONE


def _from(values: list[float]) -> str:
    """From where it came, and by how much: what a person asks of a loss."""
    if len(values) < 2:
        return "nats"
    return f"from {words.small(values[0], 3)} {words.times(words.ratio(values[-1], values[0]))}"


def samples(state: TrainingState | None) -> str:
    """The comparison's prompt, answered before and now; side by side, and the steps between behind it."""
    if state is None or not state.samples:
        if state is not None and not state.request.sample_prompt:
            return note("No sample answer was asked for: the prompt was empty.")
        if state is not None and state.over:
            return note("There is no sample answer of this run.")
        return note("The answer to the prompt above appears here, before and now.")
    last = state.samples[-1]
    now = f"now, after step {last.step:,}" if last.step else "now: the first step is still to come"
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


def _between(found: tuple[Sample, ...]) -> str:
    later = [s for s in found if s.step]
    if len(later) < 2:
        return ""
    items = "".join(
        f"<li><b>Step {s.step:,}</b> <span class='train-said' dir='auto'>{esc(s.now)}</span></li>"
        for s in later
    )
    return behind(f'<ol class="plain train-between">{items}</ol>', f"{len(later)} answers on the way")


def curve_table(curve: Iterable[LossPoint], title: str) -> str:
    """The figures behind the picture."""
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
        ("Evaluation loss", "nats, over what was held back"),
        ("Learning rate", ""),
    )
    return (
        behind(table(heads, rows, caption=f"{title}: loss by step", numeric=range(4), name="loss"))
        if rows
        else ""
    )
