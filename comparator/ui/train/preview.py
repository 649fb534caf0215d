"""The Train tab, before a run, as HTML: the data as the model will see it, and the estimate of a run."""

from __future__ import annotations

from comparator.core.errors import UserError
from comparator.training.types import FORMS, DataPreview, Estimate, SamplePreview
from comparator.ui.markup import code, esc, note, sized, table
from comparator.ui.results.notice import problem as say_problem
from comparator.util import formatting

MOST_NAMED = 5  # rows that are listed individually


def waiting(text: str = "Reading the data …") -> str:
    return f'<p class="notice" role="status"><span>{esc(text)}</span></p>'


def preview(data: DataPreview, max_length: int) -> str:
    """The detected format, warnings, and the samples."""
    used = formatting.join(
        [code(column) + ("" if role == column else f" as {esc(role)}") for role, column in data.columns]
    )
    ignored = (
        f", not used: {formatting.join([code(c) for c in data.other_columns])}" if data.other_columns else ""
    )
    form = FORMS[data.form].partition(":")[0]
    held_out = f"{data.eval_rows:,} held out" if data.eval_rows else "none held out"
    head = (
        f'<p class="train-line">{code(data.title)} {esc(form)}'
        f"{': ' + used if used else ''}{ignored} · {formatting.plural(data.rows, 'sample')}: {data.train_rows:,} for training, "
        f'{held_out} <span class="soft" title="SHA-256 of the samples">· fingerprint '
        f"{esc(data.fingerprint[:12])}</span></p>"
    )
    return head + _warnings(data, max_length) + _samples(data)


def statistics(data: DataPreview, max_length: int) -> str:
    """Token counts as a list of figures."""
    t = data.tokens
    share = f"{t.trained_tokens / t.total * 100:.0f} %" if t.total else formatting.NONE
    rows = (
        ("tokens", f"{t.total:,}", "in all samples, before truncation"),
        ("trained on", f"{t.trained_tokens:,}", f"{share}; the others are context and not in the loss"),
        ("shortest", f"{t.minimum:,}", "tokens per sample"),
        ("median", f"{t.median:,}", f"mean {t.mean:,.1f}"),
        ("95th percentile", f"{t.p95:,}", "tokens per sample"),
        ("longest", f"{t.maximum:,}", "tokens per sample"),
        (
            f"longer than {max_length:,}",
            f"{t.over_length:,}",
            f"{formatting.plural(t.cut_tokens, 'token')} truncated",
        ),
        ("skipped", f"{t.left_out:,}", "empty, or no token to train on"),
    )
    return figures(rows)


def figures(rows) -> str:
    """(name, figure, explanation) → a list of figures like that of the cards."""
    return '<dl class="figures train-figures">' + "".join(
        f"<div><dt>{esc(name)}</dt><dd>{esc(value)}</dd><dd>{esc(why)}</dd></div>" for name, value, why in rows
    ) + "</dl>"  # fmt: skip


def histogram_table(data: DataPreview) -> str:
    start, rows = 0, []
    for upto, samples in data.tokens.histogram:
        rows.append([esc(f"{start + 1:,} to {upto:,}"), sized(f"{samples:,}", samples)])
        start = upto
    return behind(
        table(
            (("Tokens", "per sample"), ("Samples", "")),
            rows, caption=f"{data.title}: samples by length", numeric=(1,), name="token-lengths",
        )
    )  # fmt: skip


def behind(html: str, title: str = "Table") -> str:
    return f'<details class="behind"><summary>{esc(title)}</summary>{html}</details>'


def _warnings(data: DataPreview, max_length: int) -> str:
    warnings = []
    t = data.tokens
    if t.over_length:
        named = ", ".join(f"row {row:,} ({tokens:,} tokens)" for row, tokens in data.long[:MOST_NAMED])
        more = " …" if t.over_length > min(len(data.long), MOST_NAMED) else ""
        warnings.append(
            f"{formatting.plural(t.over_length, 'sample')} longer than {max_length:,} tokens will be truncated, "
            f"{formatting.plural(t.cut_tokens, 'token')} in total: {named}{more}. Raise Max length to avoid this."
        )
    if data.skipped:
        named = "; ".join(f"row {row:,}: {why}" for row, why in data.skipped[:MOST_NAMED])
        more = " …" if len(data.skipped) > MOST_NAMED else ""
        warnings.append(f"Skipped: {named}{more}")
    warnings += data.notes
    return (
        f'<ul class="plain train-notes">{"".join(f"<li>{esc(s)}</li>" for s in warnings)}</ul>'
        if warnings
        else ""
    )


def _samples(data: DataPreview) -> str:
    legend = (
        f'<p class="note train-legend"><span class="piece trained">Underlined: trained on</span> '
        f'<span class="piece masked">Grey, in italics: context, not in the loss</span> {esc(data.masking)}</p>'
    )
    return f'{legend}<div class="train-samples">{"".join(map(sample, data.samples))}</div>'


def sample(one: SamplePreview) -> str:
    """A sample's tokens as text; masked ones are grey and italic, with a word for screen readers."""
    pieces = "".join(
        f'<span class="piece {"trained" if p.is_target else "masked"}">'
        f'<span class="unseen">{"trained on:" if p.is_target else "masked:"} </span>{esc(p.text)}</span>'
        for p in one.pieces
    )
    cut = (
        f'<p class="train-cut">✂ {formatting.plural(one.cut_tokens, "token")} truncated here</p>'
        if one.cut_tokens
        else ""
    )
    title = f"Sample in row {one.row:,}"
    return (
        f'<section class="train-sample" aria-label="{esc(title)}"><header><b>Row {one.row:,}</b><span>'
        f"{formatting.plural(one.tokens, 'token')}, {one.trained_tokens:,} trained on</span></header>"
        f'<div class="train-text" tabindex="0" role="region" aria-label="{esc(title)}, text" dir="auto">{pieces}{cut}'
        "</div></section>"
    )


# ---------------------------------------------------------------- the estimate


PARTS = (
    ("weight_bytes", "weights"),
    ("adapter_bytes", "adapter and gradients"),
    ("optimizer_bytes", "optimizer"),
    ("activation_bytes", "activations"),
)


def estimate(plan: Estimate, base: str) -> str:
    """Trainable parameters, steps and memory, before anything starts."""
    if plan.problem is not None:
        error = say_problem(UserError(plan.problem.problem, plan.problem.advice))
    else:
        error = ""
    trained = f"{formatting.parameters(plan.trainable_parameters)} trainable parameters"
    of = f" of {formatting.parameters(plan.total_parameters + plan.trainable_parameters)} ({plan.share * 100:.2g} %)"
    checkpointing = ", gradient checkpointing" if plan.gradient_checkpointing else ""
    parts = " + ".join(
        f"{description} {_mb(getattr(plan, name))}" for name, description in PARTS if getattr(plan, name)
    )
    share = plan.total_bytes / plan.free_bytes if plan.free_bytes else None
    fill = "" if share is None else (
        f'<span class="train-meter" aria-hidden="true"><i style="width:{min(1.0, share) * 100:.1f}%"></i></span>'
    )  # fmt: skip
    notes = "".join(f"<li>{esc(n)}</li>" for n in plan.notes)
    return (
        f'{error}<div class="train-plan"><p><b>{esc(trained)}</b>{esc(of)} · <b>'
        f"{esc(formatting.plural(plan.steps, 'step'))}</b> on {code(base)} · {esc(plan.optimizer)}{checkpointing}</p>"
        f"<p>{fill}<b>About {_mb(plan.total_bytes)} of memory</b> (estimate), {_mb(plan.free_bytes)} free on {esc(plan.device)} "
        f'<span class="soft">= {esc(parts)}</span></p>'
        + (f'<ul class="plain">{notes}</ul>' if notes else "")
        + f'<p class="soft">Target modules: {_targets(plan.targets)}</p></div>'
    )


def _mb(value: int | None) -> str:
    return formatting.megabytes(value) if value is None or value < 10e9 else f"{value / 1e9:,.1f} GB"


def _targets(targets: tuple[str, ...]) -> str:
    return formatting.join([code(name) for name in targets]) or "none"


def refused(problem: UserError) -> str:
    """An error in place of the preview."""
    return say_problem(problem)


def unavailable(reason: str) -> str:
    """The whole tab where training is disabled."""
    return note(f"<b>Training is disabled here.</b> {esc(reason)}")
