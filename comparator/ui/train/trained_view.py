"""The Train tab, after a run, as HTML: facts about an adapter, and its evaluation."""

from __future__ import annotations

from comparator.training.types import EvalRow, Evaluation, TrainingResult
from comparator.ui.markup import code, esc, note, sized, table
from comparator.ui.results.saved_comparison import when
from comparator.util import formatting

EMPTY = "No trained adapters yet. They will be listed here and under Adapters on the left."


def choices(results: tuple[TrainingResult, ...]) -> list[tuple[str, str]]:
    return [
        (f"{r.name} · {r.data} on {r.base}" + (" · stopped early" if r.partial else ""), r.name)
        for r in results
    ]


def described(result: TrainingResult) -> str:
    """An adapter in figures: its data, loss, steps and size."""
    early = " · <b>stopped early</b>" if result.partial else ""
    rows = (
        ("loss", formatting.small(result.last_loss), _from(result.first_loss, result.last_loss)),
        ("evaluation loss", formatting.small(result.eval_loss), _from(result.eval_before, result.eval_loss)),
        (
            "steps",
            f"{result.steps:,}",
            f"of {result.of:,}" if result.partial else f"in {formatting.duration(result.train_s)}",
        ),
        ("speed", formatting.figure(result.tok_s, "tok/s"), ""),
        ("trained", formatting.parameters(result.trainable_parameters), "parameters"),
        ("file", formatting.megabytes(result.file_bytes), "safetensors"),
    )
    tiles = "".join(f"<div><dt>{esc(n)}</dt><dd>{esc(v)}</dd><dd>{esc(w)}</dd></div>" for n, v, w in rows)
    notes = "".join(f"<li>{esc(n)}</li>" for n in result.notes)
    return (
        f'<p class="train-line">{code(result.name)} {esc(result.data)} ({result.train_rows:,} training samples, '
        f"{result.eval_rows:,} held out) on {code(result.base)} of {esc(result.model)}{early} · "
        f'{esc(when(result.created_at))}</p><dl class="train-tiles">{tiles}</dl>'
        + (f'<ul class="plain">{notes}</ul>' if notes else "")
        + f'<p class="soft train-path">Stored in <code>{esc(result.path)}</code> · data <code>'
        f"{esc(result.fingerprint[:12])}</code></p>"
    )


def _from(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return "not measured" if last is None else "nats"
    return f"from {formatting.small(first)} {formatting.times(formatting.ratio(last, first))}"


def evaluation_table(evaluation: Evaluation | None) -> str:
    """The table of an evaluation: one row per variant, without and with the adapter."""
    if evaluation is None:
        return ""
    by_variant: dict[str, dict[bool, EvalRow]] = {}
    for row in evaluation.rows:
        by_variant.setdefault(row.variant, {})[row.adapter is not None] = row
    rows, failed = [], []
    for variant, pair in by_variant.items():
        bare, adapted = pair.get(False), pair.get(True)
        change = formatting.ratio(adapted.perplexity, bare.perplexity) if adapted and bare else None
        mark = ' <span class="tag">trained on</span>' if variant == evaluation.base else ""
        rows.append(
            [
                code(variant) + mark,
                _cell(bare, "loss"),
                _cell(adapted, "loss"),
                _cell(bare, "perplexity"),
                _cell(adapted, "perplexity"),
                "" if change is None else sized(f"{formatting.times(change)} {_judged(change)}", change),
            ]
        )
        failed += [(r, r.problem) for r in pair.values() if r.problem is not None]
    measured = next((r for r in evaluation.rows if r.rows), None)
    amount = (
        f", {formatting.plural(measured.rows, 'sample')} ({formatting.plural(measured.tokens, 'token')}) that were "
        "not trained on" if measured else ""
    )  # fmt: skip
    heads = (
        ("Variant", ""),
        ("Loss", "without the adapter: mean negative log-likelihood of the trained-on tokens, nats"),
        ("with it", "loss with the adapter, nats"),
        ("Perplexity", "exp of the loss, without the adapter"),
        ("with it", "perplexity with the adapter"),
        ("Change", "perplexity with the adapter over perplexity without; below 1 is better"),
    )
    html = table(
        heads, rows, caption=f"Without and with the adapter{amount}; {when(evaluation.created_at)}",
        numeric=range(1, 6), name="evaluation",
    )  # fmt: skip
    failures = "".join(
        f"<li>{code(_named(row))} <b>{esc(error.problem)}</b> {esc(error.advice)}</li>"
        for row, error in failed
    )
    return (
        html
        + (f'<ul class="plain train-wrong">{failures}</ul>' if failures else "")
        + (note(esc(evaluation.note)) if evaluation.note else "")
    )


def _named(row: EvalRow) -> str:
    return f"{row.variant} + {row.adapter}" if row.adapter else row.variant


def _judged(change: float) -> str:
    return formatting.judged(change, "better", "worse")


def _cell(row: EvalRow | None, name: str) -> str:
    if row is None:
        return ""
    if row.problem is not None:
        return "failed"
    value = getattr(row, name)
    return (
        sized(formatting.small(value, 4 if name == "loss" else 3), value)
        if value is not None
        else formatting.NONE
    )
