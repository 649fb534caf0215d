"""What `train` prints: data as the model sees them, the estimate, progress, results. Text in, text out."""

from __future__ import annotations

import threading
from typing import Any

from comparator import words
from comparator.cli.progress import Progress
from comparator.cli.tables import printable
from comparator.training.types import (
    Cancelled,
    DataPreview,
    Estimate,
    EvalRow,
    Evaluation,
    Failed,
    Preparing,
    Sample,
    Saving,
    Step,
    Trained,
    TrainingResult,
    TrainRequest,
    Waiting,
)


def before(trainings: Any, request: TrainRequest) -> str:
    """Two lines on what is about to be trained."""
    data = trainings.preview(request.data, request.model, request.settings, request.system)
    lines = [data_line(data)]
    plan = trainings.estimate(request, data)
    if plan.fits:
        lines.append(plan_line(request.base, plan))
    return "\n".join(lines + [*data.notes])


def data_line(data: DataPreview) -> str:
    columns = ", ".join(f"{role} = {name}" for role, name in data.columns)
    tokens = data.tokens
    text = (
        f"{data.title}: {words.plural(data.train_rows, 'sample')} to train on, {data.eval_rows} held back ({columns}); "
        f"{tokens.total:,} tokens, {tokens.median:,} in the middle, {tokens.maximum:,} at most"
    )
    if tokens.over_length:
        text += f"; {tokens.over_length:,} too long and cut"
    return text


def plan_line(base: str, plan: Estimate) -> str:
    again = ", gradient checkpointing" if plan.gradient_checkpointing else ""
    return (
        f"{base}: {plan.trainable_parameters:,} trainable parameters ({plan.share:.2%}) on {', '.join(plan.targets)}; "
        f"{words.plural(plan.steps, 'step')}; about {plan.total_bytes / 1e9:.2f} GB of {plan.free_bytes / 1e9:.1f} GB "
        f"on {plan.device} ({plan.optimizer}{again})"
    )


def preview(trainings: Any, request: TrainRequest) -> tuple[str, bool]:
    """The samples with what is masked in ⟦brackets⟧, and the estimate; whether it fits."""
    data = trainings.preview(request.data, request.model, request.settings, request.system)
    lines = [data_line(data), data.masking.replace("Grey", "⟦In brackets⟧")]
    for sample in data.samples:
        cut = f", {sample.cut_tokens:,} cut off" if sample.cut_tokens else ""
        lines.append(f"\n── row {sample.row}: {sample.tokens} tokens, {sample.learnt_tokens} learnt{cut}")
        lines.append(printable("".join(p.text if p.learnt else f"⟦{p.text}⟧" for p in sample.pieces)))
    if data.long:
        lines.append(
            f"\nToo long: {', '.join(f'row {row} ({count:,} tokens)' for row, count in data.long[:5])}"
        )
    lines += [f"Left out: row {row}: {why}" for row, why in data.skipped[:5]] + list(data.notes)
    plan = trainings.estimate(request, data)
    lines.append(f"\n{plan_line(request.base, plan)}")
    if plan.problem:
        lines.append(f"{plan.problem.problem} {plan.problem.advice}")
    return "\n".join(lines), plan.fits


def followed(trainings: Any, job: str, cancel: threading.Event, progress: Progress, said: list[str]) -> int:
    """Show a job until it ends; returns the exit code."""
    stop = threading.Thread(target=lambda: (cancel.wait(), trainings.stop(job)), daemon=True)
    stop.start()
    for event in trainings.events(job):
        match event:
            case Waiting():
                progress.status("waiting for the device", f": {event.behind}" if event.behind else "")
            case Preparing():
                progress.status(event.message, "" if event.fraction is None else f" {event.fraction:.0%}")
            case Step():
                if progress.live and event.eval_loss is None:
                    progress.status(_step(event))
                else:  # an evaluation stays on the terminal, and every step in a log
                    progress.line(_step(event))
            case Sample():
                progress.line(f"   step {event.step}: {event.now.strip()!r}")
            case Saving():
                progress.status(f"saving {event.what}")
            case Trained():
                said.append(report(event.result))
                return 130 if event.result.partial and cancel.is_set() else 0
            case Cancelled():
                progress.line("Stopped before the first step; nothing was kept.")
                return 130
            case Failed():
                progress.line(f"Failed: {event.problem} {event.advice}".rstrip())
                if event.checkpoint_step is not None:
                    progress.line(
                        f"Go on from step {event.checkpoint_step}:  python -m comparator train --resume {job}"
                    )
                return 1
    return 1


def _step(event: Step) -> str:
    if event.eval_loss is not None:
        return f"   step {event.step}/{event.of}  loss on held-back samples {event.eval_loss:.3f}"
    parts = [f"step {event.step}/{event.of}  loss {event.loss:.3f}"]
    parts += [f"{event.tok_s:.0f} tok/s"] if event.tok_s else []
    parts += [f"{event.memory_bytes / 1e9:.2f} GB"] if event.memory_bytes else []
    parts += [f"{event.eta_s:.0f} s left"] if event.eta_s is not None else []
    return "  ".join(parts)


def last_result(trainings: Any) -> TrainingResult:
    """Of the job of this process that has just ended."""
    return next(s.result for s in trainings.jobs() if s.result is not None)


def report(result: TrainingResult) -> str:
    lines = [
        f"Trained {result.name} on {result.base}: {result.steps} of {result.of} steps in {result.train_s:.0f} s"
    ]
    if result.first_loss is not None and result.last_loss is not None:
        lines.append(f"  loss {result.first_loss:.3f} → {result.last_loss:.3f}")
    if result.eval_loss is not None:
        began = f"{result.eval_before:.3f} → " if result.eval_before is not None else ""
        lines.append(
            f"  loss on {words.plural(result.eval_rows, 'held-back sample')} {began}{result.eval_loss:.3f}"
        )
    if result.tok_s:
        lines.append(f"  {result.tok_s:.0f} tokens/s; peak {(result.peak_bytes or 0) / 1e9:.2f} GB")
    lines.append(
        f"  {result.trainable_parameters:,} parameters, {result.file_bytes / 1e6:.1f} MB in {result.path}"
    )
    lines += [f"  {note}" for note in result.notes]
    lines.append(
        f"  Compare:  python -m comparator run -v bf16 -v {result.base} --adapter {result.adapter} -p “…”"
    )
    return printable("\n".join(lines))


def compared(
    trainings: Any, name: str, variants: list[str], cancel: threading.Event, progress: Progress
) -> str:
    """The table of held-back loss and perplexity."""
    made = None
    for item in trainings.evaluate(name, variants, cancel):
        if isinstance(item, Evaluation):
            made = item
        elif not isinstance(item, EvalRow):
            progress.status(item.message, "" if item.fraction is None else f" {item.fraction:.0%}")
    progress.end()
    return evaluation_table(made, trainings.result(name))


def evaluation_table(made: Evaluation, result: TrainingResult) -> str:
    lines = [
        f"Held-back samples of {result.data} ({result.eval_rows}), trained on {made.base}; loss in nats a token"
    ]
    width = max([len(_column(r)) for r in made.rows] + [8])
    lines.append(f"{'column':{width}}  {'loss':>8}  {'perplexity':>10}  {'tokens':>6}")
    for row in made.rows:
        if row.problem:
            lines.append(f"{_column(row):{width}}  {row.problem.problem} {row.problem.advice}")
        else:
            lines.append(f"{_column(row):{width}}  {row.loss:8.3f}  {row.perplexity:10.2f}  {row.tokens:6,}")
    return printable("\n".join(lines + ([made.note] if made.note else [])))


def _column(row: EvalRow) -> str:
    return f"{row.variant} + {row.adapter}" if row.adapter else row.variant


def listing(trainings: Any) -> str:
    """What was trained here, and what was left unfinished."""
    lines = [
        f"{r.name:24} on {r.base:12} {r.model:16} {r.steps:>6} steps  {r.created_at}{'  (a part)' * r.partial}"
        for r in trainings.finished()
    ]
    left = [s for s in trainings.jobs() if s.status == "interrupted"]
    lines += [f"{s.job:24} unfinished: {s.message}" for s in left]
    return printable("\n".join(lines) or "Nothing was trained here yet.")
