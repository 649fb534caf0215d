"""The output of `train`: data preview, estimate, progress, results, as text."""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import Any

from comparator.cli import error_details
from comparator.cli.options import print_json
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
from comparator.util import formatting


@dataclass(frozen=True)
class Result:
    """One result of the command: `value` under `key` of the document that `--json` prints, `text` without."""

    key: str
    value: Any
    text: str


def print_results(results: list[Result], as_json: bool) -> None:
    """The results on stdout; as JSON one object, which is empty where the training failed."""
    if as_json:
        print_json({result.key: result.value for result in results})
        return
    for result in results:
        print(result.text)


def before(trainings: Any, request: TrainRequest) -> str:
    """Two lines about the data and the estimate of a run."""
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
        f"{data.title}: {formatting.plural(data.train_rows, 'sample')} for training, {data.eval_rows} held out ({columns}); "
        f"{tokens.total:,} tokens, median {tokens.median:,}, maximum {tokens.maximum:,}"
    )
    if tokens.over_length:
        text += f"; {tokens.over_length:,} truncated"
    return text


def plan_line(base: str, plan: Estimate) -> str:
    again = ", gradient checkpointing" if plan.gradient_checkpointing else ""
    return (
        f"{base}: {plan.trainable_parameters:,} trainable parameters ({plan.share:.2%}) on {', '.join(plan.targets)}; "
        f"{formatting.plural(plan.steps, 'step')}; about {plan.total_bytes / 1e9:.2f} GB of {plan.free_bytes / 1e9:.1f} GB "
        f"on {plan.device} ({plan.optimizer}{again})"
    )


def preview(trainings: Any, request: TrainRequest) -> tuple[Result, bool]:
    """(the samples with masked tokens in ⟦brackets⟧ and the estimate, whether the run fits in memory)."""
    data = trainings.preview(request.data, request.model, request.settings, request.system)
    lines = [data_line(data), data.masking.replace("Grey", "⟦In brackets⟧")]
    for sample in data.samples:
        cut = f", {sample.cut_tokens:,} truncated" if sample.cut_tokens else ""
        lines.append(
            f"\n── row {sample.row}: {sample.tokens} tokens, {sample.trained_tokens} trained on{cut}"
        )
        lines.append(printable("".join(p.text if p.is_target else f"⟦{p.text}⟧" for p in sample.pieces)))
    if data.long:
        lines.append(
            f"\nToo long: {', '.join(f'row {row} ({count:,} tokens)' for row, count in data.long[:5])}"
        )
    lines += [f"Skipped: row {row}: {why}" for row, why in data.skipped[:5]] + list(data.notes)
    plan = trainings.estimate(request, data)
    lines.append(f"\n{plan_line(request.base, plan)}")
    if plan.problem:
        lines.append(f"{plan.problem.problem} {plan.problem.advice}")
    value = {"data": asdict(data), "estimate": {**asdict(plan), "fits": plan.fits}}
    return Result("preview", value, "\n".join(lines)), plan.fits


def followed(
    trainings: Any, job: str, cancel: threading.Event, progress: Progress, results: list[Result]
) -> int:
    """Print the progress of a job until it ends; returns the exit code."""
    stop = threading.Thread(target=lambda: (cancel.wait(), trainings.stop(job)), daemon=True)
    stop.start()
    for event in trainings.events(job):
        match event:
            case Waiting():
                progress.status("queued for the device", detail=f": {event.behind}" if event.behind else "")
            case Preparing():
                progress.status(event.message, event.fraction)
            case Step():
                if progress.live and event.eval_loss is None:
                    progress.status(_step(event))
                else:  # evaluations stay on the terminal; in a log every step does
                    progress.remark(_step(event))
            case Sample():
                progress.remark(f"   step {event.step}: {event.now.strip()!r}")
            case Saving():
                progress.status(f"saving {event.what}")
            case Trained():
                results.append(Result("result", event.result.to_dict(), report(event.result)))
                return 130 if event.result.partial and cancel.is_set() else 0
            case Cancelled():
                progress.line("Stopped before the first step; nothing was saved.")
                return 130
            case Failed():
                progress.line(f"Failed: {event.problem} {event.advice}".rstrip())
                error_details.show(event.error_id, progress.line)
                if event.checkpoint_step is not None:
                    progress.line(
                        f"Resume from step {event.checkpoint_step}:  python -m comparator train --resume {job}"
                    )
                return 1
    return 1


def _step(event: Step) -> str:
    if event.eval_loss is not None:
        return f"   step {event.step}/{event.of}  loss on held-out samples {event.eval_loss:.3f}"
    parts = [f"step {event.step}/{event.of}  loss {event.loss:.3f}"]
    parts += [f"{event.tok_s:.0f} tok/s"] if event.tok_s else []
    parts += [f"{event.memory_bytes / 1e9:.2f} GB"] if event.memory_bytes else []
    parts += [f"{event.eta_s:.0f} s left"] if event.eta_s is not None else []
    return "  ".join(parts)


def last_result(trainings: Any) -> TrainingResult:
    """The result of the job of this process that has just ended."""
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
            f"  loss on {formatting.plural(result.eval_rows, 'held-out sample')} {began}{result.eval_loss:.3f}"
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
) -> Result:
    """The table of loss and perplexity on the held-out samples."""
    evaluation = trainings.evaluate(name, variants, cancel, progress.report)
    return Result("evaluation", asdict(evaluation), evaluation_table(evaluation, trainings.result(name)))


def evaluation_table(made: Evaluation, result: TrainingResult) -> str:
    lines = [
        f"Held-out samples of {result.data} ({result.eval_rows}), trained on {made.base}; loss in nats per token"
    ]
    width = max([len(_column(r)) for r in made.rows] + [8])
    lines.append(f"{'variant':{width}}  {'loss':>8}  {'perplexity':>10}  {'tokens':>6}")
    for row in made.rows:
        if row.problem:
            lines.append(f"{_column(row):{width}}  {row.problem.problem} {row.problem.advice}")
        else:
            lines.append(f"{_column(row):{width}}  {row.loss:8.3f}  {row.perplexity:10.2f}  {row.tokens:6,}")
    return printable("\n".join(lines + ([made.note] if made.note else [])))


def _column(row: EvalRow) -> str:
    return f"{row.variant} + {row.adapter}" if row.adapter else row.variant


def listed(trainings: Any) -> dict[str, list[dict]]:
    """The trained adapters and the unfinished runs, for `--json`."""
    left = [s for s in trainings.jobs() if s.status == "interrupted"]
    unfinished = [{"name": s.job, "message": s.message, "checkpoint_step": s.checkpoint_step} for s in left]
    return {"adapters": [r.to_dict() for r in trainings.finished()], "unfinished": unfinished}


def listing(trainings: Any) -> str:
    """The trained adapters and the unfinished runs."""
    lines = [
        f"{r.name:24} on {r.base:12} {r.model:16} {r.steps:>6} steps  {r.created_at}{'  (stopped early)' * r.partial}"
        for r in trainings.finished()
    ]
    left = [s for s in trainings.jobs() if s.status == "interrupted"]
    lines += [f"{s.job:24} unfinished: {s.message}" for s in left]
    return printable("\n".join(lines) or "No trained adapters yet.")
