"""The Train tab, before a run: the data as the model will see it, and what a run would take. As HTML."""

from __future__ import annotations

from comparator import words
from comparator.training.types import FORMS, DataPreview, Estimate, SamplePreview
from comparator.types import Problem
from comparator.ui.components.notice import problem as say_problem
from comparator.ui.markup import code, esc, note, sized, table

MOST_NAMED = 5  # rows that are told one by one


def waiting(text: str = "Reading the data …") -> str:
    return f'<p class="notice" role="status"><span>{esc(text)}</span></p>'


def preview(data: DataPreview, max_length: int) -> str:
    """What was recognized, what is too long, and the samples."""
    used = words.join(
        [code(column) + ("" if role == column else f" as {esc(role)}") for role, column in data.columns]
    )
    ignored = f", not used: {words.join([code(c) for c in data.other_columns])}" if data.other_columns else ""
    form = FORMS[data.form].partition(":")[0]
    held = f"{data.eval_rows:,} held back" if data.eval_rows else "none held back"
    head = (
        f'<p class="train-line">{code(data.title)} {esc(form)}'
        f"{': ' + used if used else ''}{ignored} · {words.plural(data.rows, 'sample')}: {data.train_rows:,} to train on, "
        f'{held} <span class="soft" title="SHA-256 of the samples as they are used">· fingerprint '
        f"{esc(data.fingerprint[:12])}</span></p>"
    )
    return head + _warnings(data, max_length) + _samples(data)


def statistics(data: DataPreview, max_length: int) -> str:
    """How many tokens there are, as a list of figures."""
    t = data.tokens
    share = f"{t.learnt / t.total * 100:.0f} %" if t.total else words.NONE
    rows = (
        ("tokens", f"{t.total:,}", "in all samples, before any is cut"),
        ("of them learnt", f"{t.learnt:,}", f"{share}; the others are read, and not in the loss"),
        ("shortest", f"{t.minimum:,}", "tokens of a sample"),
        ("median", f"{t.median:,}", f"the mean is {t.mean:,.1f}"),
        ("19 of 20 have at most", f"{t.p95:,}", "95th percentile"),
        ("longest", f"{t.maximum:,}", "tokens of a sample"),
        (f"longer than {max_length:,}", f"{t.over_length:,}", f"{t.cut_tokens:,} tokens are cut off"),
        ("left out", f"{t.left_out:,}", "empty, or nothing of them would be learnt"),
    )
    return figures(rows)


def figures(rows) -> str:
    """(name, figure, explanation) → the same list that cards have."""
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
            (("Tokens", "of a sample"), ("Samples", "")),
            rows, caption=f"{data.title}: samples by length", numeric=(1,), name="token-lengths",
        )
    )  # fmt: skip


def behind(html: str, title: str = "Table") -> str:
    return f'<details class="behind"><summary>{esc(title)}</summary>{html}</details>'


def _warnings(data: DataPreview, max_length: int) -> str:
    said = []
    t = data.tokens
    if t.over_length:
        named = ", ".join(f"row {row:,} ({tokens:,} tokens)" for row, tokens in data.long[:MOST_NAMED])
        more = " …" if t.over_length > min(len(data.long), MOST_NAMED) else ""
        said.append(
            f"{words.plural(t.over_length, 'sample')} longer than {max_length:,} tokens will be cut at the end, "
            f"{words.plural(t.cut_tokens, 'token')} in all: {named}{more}. Raise Max length to keep them whole."
        )
    if data.skipped:
        named = "; ".join(f"row {row:,}: {why}" for row, why in data.skipped[:MOST_NAMED])
        more = " …" if len(data.skipped) > MOST_NAMED else ""
        said.append(f"Left out: {named}{more}")
    said += data.notes
    return f'<ul class="plain train-notes">{"".join(f"<li>{esc(s)}</li>" for s in said)}</ul>' if said else ""


def _samples(data: DataPreview) -> str:
    legend = (
        f'<p class="note train-legend"><span class="piece learnt">Underlined: learnt</span> '
        f'<span class="piece masked">Grey, in italics: read, not in the loss</span> {esc(data.masking)}</p>'
    )
    return f'{legend}<div class="train-samples">{"".join(map(sample, data.samples))}</div>'


def sample(one: SamplePreview) -> str:
    """A sample's tokens as text, what is masked told by grey, italics and a word for those who cannot see."""
    pieces = "".join(
        f'<span class="piece {"learnt" if p.learnt else "masked"}">'
        f'<span class="unseen">{"learnt:" if p.learnt else "not learnt:"} </span>{esc(p.text)}</span>'
        for p in one.pieces
    )
    cut = (
        f'<p class="train-cut">✂ {words.plural(one.cut_tokens, "token")} cut off here</p>'
        if one.cut_tokens
        else ""
    )
    title = f"Sample in row {one.row:,}"
    return (
        f'<section class="train-sample" aria-label="{esc(title)}"><header><b>Row {one.row:,}</b><span>'
        f"{words.plural(one.tokens, 'token')}, {one.learnt_tokens:,} learnt</span></header>"
        f'<div class="train-text" tabindex="0" role="region" aria-label="{esc(title)}, text" dir="auto">{pieces}{cut}'
        "</div></section>"
    )


# ---------------------------------------------------------------- what it would take


PARTS = (
    ("weight_bytes", "weights"),
    ("adapter_bytes", "adapter and gradients"),
    ("optimizer_bytes", "optimizer"),
    ("activation_bytes", "activations"),
)


def estimate(found: Estimate, base: str) -> str:
    """Trainable parameters, steps and memory, before anything starts."""
    if found.problem is not None:
        wrong = say_problem(Problem(found.problem.problem, found.problem.advice))
    else:
        wrong = ""
    trained = f"{words.parameters(found.trainable_parameters)} trainable parameters"
    of = f" of {words.parameters(found.total_parameters + found.trainable_parameters)} ({found.share * 100:.2g} %)"
    checkpointing = ", gradient checkpointing" if found.gradient_checkpointing else ""
    parts = " + ".join(f"{what} {_mb(getattr(found, name))}" for name, what in PARTS if getattr(found, name))
    share = found.total_bytes / found.free_bytes if found.free_bytes else None
    fill = "" if share is None else (
        f'<span class="train-meter" aria-hidden="true"><i style="width:{min(1.0, share) * 100:.1f}%"></i></span>'
    )  # fmt: skip
    notes = "".join(f"<li>{esc(n)}</li>" for n in found.notes)
    return (
        f'{wrong}<div class="train-plan"><p><b>{esc(trained)}</b>{esc(of)} · <b>'
        f"{esc(words.plural(found.steps, 'step'))}</b> on {code(base)} · {esc(found.optimizer)}{checkpointing}</p>"
        f"<p>{fill}<b>About {_mb(found.total_bytes)} of memory</b>, {_mb(found.free_bytes)} free on {esc(found.device)} "
        f'<span class="soft">= {esc(parts)}; an estimate</span></p>'
        + (f'<ul class="plain">{notes}</ul>' if notes else "")
        + f'<p class="soft">On {_targets(found.targets)}.</p></div>'
    )


def _mb(value: int | None) -> str:
    return words.megabytes(value) if value is None or value < 10e9 else f"{value / 1e9:,.1f} GB"


def _targets(targets: tuple[str, ...]) -> str:
    return words.join([code(name) for name in targets]) or "no layer"


def refused(problem: Problem) -> str:
    """Where the preview would stand: what is wrong, and what to do."""
    return say_problem(problem)


def not_here(reason: str) -> str:
    """Instead of the whole tab, where nothing is trained."""
    return note(f"<b>Nothing is trained here.</b> {esc(reason)}")
