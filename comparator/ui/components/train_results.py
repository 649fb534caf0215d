"""The Train tab, after a run: what an adapter came to, and every variant with and without it. As HTML."""

from __future__ import annotations

from comparator import words
from comparator.training.types import EvalRow, Evaluation, TrainingResult
from comparator.ui.components.recording import when
from comparator.ui.components.train_watch import duration
from comparator.ui.markup import code, esc, note, sized, table

NOTHING = "Nothing trained yet. What you train is listed here, and among the adapters on the left."


def choices(results: tuple[TrainingResult, ...]) -> list[tuple[str, str]]:
    return [
        (f"{r.name} · {r.data} on {r.base}" + (" · stopped early" if r.partial else ""), r.name)
        for r in results
    ]


def described(result: TrainingResult) -> str:
    """An adapter in figures: what it learnt from, how far it came, what it weighs."""
    early = " · <b>stopped early</b>" if result.partial else ""
    rows = (
        ("loss", words.small(result.last_loss), _from(result.first_loss, result.last_loss)),
        ("evaluation loss", words.small(result.eval_loss), _from(result.eval_before, result.eval_loss)),
        (
            "steps",
            f"{result.steps:,}",
            f"of {result.of:,}" if result.partial else f"in {duration(result.train_s)}",
        ),
        ("speed", words.figure(result.tok_s, "tok/s"), ""),
        ("trained", words.parameters(result.trainable_parameters), "parameters"),
        ("file", words.megabytes(result.file_bytes), "safetensors"),
    )
    tiles = "".join(f"<div><dt>{esc(n)}</dt><dd>{esc(v)}</dd><dd>{esc(w)}</dd></div>" for n, v, w in rows)
    notes = "".join(f"<li>{esc(n)}</li>" for n in result.notes)
    return (
        f'<p class="train-line">{code(result.name)} {esc(result.data)} ({result.train_rows:,} trained on, '
        f"{result.eval_rows:,} held back) on {code(result.base)} of {esc(result.model)}{early} · "
        f'{esc(when(result.created_at))}</p><dl class="train-tiles">{tiles}</dl>'
        + (f'<ul class="plain">{notes}</ul>' if notes else "")
        + f'<p class="soft train-path">Kept in <code>{esc(result.path)}</code> · data <code>'
        f"{esc(result.fingerprint[:12])}</code></p>"
    )


def _from(first: float | None, last: float | None) -> str:
    if first is None or last is None:
        return "not measured" if last is None else "nats"
    return f"from {words.small(first)} {words.times(words.ratio(last, first))}"


def evaluation(found: Evaluation | None) -> str:
    """The table behind the bars; columns of one variant stand side by side."""
    if found is None:
        return ""
    by_variant: dict[str, dict[bool, EvalRow]] = {}
    for row in found.rows:
        by_variant.setdefault(row.variant, {})[row.adapter is not None] = row
    rows, wrong = [], []
    for variant, pair in by_variant.items():
        bare, worn = pair.get(False), pair.get(True)
        change = words.ratio(worn.perplexity, bare.perplexity) if worn and bare else None
        mark = ' <span class="tag">trained on</span>' if variant == found.base else ""
        rows.append(
            [
                code(variant) + mark,
                _cell(bare, "loss"),
                _cell(worn, "loss"),
                _cell(bare, "perplexity"),
                _cell(worn, "perplexity"),
                "" if change is None else sized(f"{words.times(change)} {_judged(change)}", change),
            ]
        )
        wrong += [(r, r.problem) for r in pair.values() if r.problem is not None]
    measured = next((r for r in found.rows if r.rows), None)
    amount = (
        f", {words.plural(measured.rows, 'sample')} ({words.plural(measured.tokens, 'token')}) that nothing was "
        "trained on" if measured else ""
    )  # fmt: skip
    heads = (
        ("Variant", ""),
        ("Loss", "without the adapter: mean negative log-likelihood of the learnt tokens, nats"),
        ("with it", "loss with the adapter, nats"),
        ("Perplexity", "exp of the loss, without the adapter"),
        ("with it", "perplexity with the adapter"),
        ("Change", "perplexity with the adapter over perplexity without; below 1 is better"),
    )
    html = table(
        heads, rows, caption=f"With and without the adapter{amount}; {when(found.created_at)}",
        numeric=range(1, 6), name="evaluation",
    )  # fmt: skip
    said = "".join(
        f"<li>{code(_named(row))} <b>{esc(error.problem)}</b> {esc(error.advice)}</li>"
        for row, error in wrong
    )
    return (
        html
        + (f'<ul class="plain train-wrong">{said}</ul>' if said else "")
        + (note(esc(found.note)) if found.note else "")
    )


def _named(row: EvalRow) -> str:
    return f"{row.variant} + {row.adapter}" if row.adapter else row.variant


def _judged(change: float) -> str:
    return words.judged(change, "better", "worse")


def _cell(row: EvalRow | None, name: str) -> str:
    if row is None:
        return ""
    if row.problem is not None:
        return "failed"
    value = getattr(row, name)
    return sized(words.small(value, 4 if name == "loss" else 3), value) if value is not None else words.NONE
