"""Fidelity as tables: the verdict on each column, and every figure of the evaluation text."""

from __future__ import annotations

from comparator.core import devices
from comparator.core.result import CellResult, Comparison
from comparator.fidelity import verdict
from comparator.fidelity.verdict import Estimate, Verdict
from comparator.metrics.definitions import stored_bytes
from comparator.reporting.plots import style
from comparator.ui.markup import code, esc, sized, swatch, table
from comparator.util import formatting
from comparator.util.formatting import small

VERDICT_HEADS = (
    ("Variant", ""),
    ("Verdict", "see the rule below the table"),
    ("Size, MB", "weights and quant state; MB are 10^6 bytes"),
    ("Speed, tok/s", "× is the ratio to the reference"),
    (
        "KL, nats",
        "mean KL divergence from the reference, ± its standard error; ≥: a lower bound, from the most likely tokens only",
    ),
    ("Noise floor", "KL of the variant with itself, the text in chunks of 64: rounding errors only"),
    ("Perplexity", "of the evaluation text, ± its standard error"),
    ("Top-1", "top-1 agreement: how often both have the same most likely token, ± its standard error"),
)
TEXT_HEADS = (
    ("Variant", ""),
    ("KL mean", "KL(reference ‖ variant) in nats, ± its standard error"),
    ("median", ""),
    ("90 %", "90th percentile"),
    ("99 %", "99th percentile"),
    ("99.9 %", "99.9th percentile"),
    ("maximum", ""),
    ("Reverse KL", "KL(variant ‖ reference), mean ± its standard error"),
    ("Δp mean", "change of the probability of the actual next token, in percentage points"),
    ("Δp RMS", "root mean square of that change"),
    ("PPL ratio", "perplexity over the reference's, ± its standard error"),
    ("Correlation", "of the log-probabilities with the reference's"),
    ("Top-5 overlap", "share of the reference's five most likely tokens that are among the variant's five"),
)


def verdict_table(comparison: Comparison) -> str:
    colour_of = style.comparison_colours(comparison)
    rows = [_verdict_row(v, colour_of[v.cell.variant]) for v in verdict.verdicts(comparison)]
    return (
        table(VERDICT_HEADS, rows, caption="Verdict", numeric=range(2, 8), name="fidelity-verdict")
        + f'<p class="foot"><b>The rule.</b> {esc(verdict.RULE)}</p>'
    )


def _verdict_row(one: Verdict, colour: str) -> list[str]:
    cell = one.cell
    size = stored_bytes(cell)
    ratio = ""
    if one.ppl_ratio is not None:
        unsure = one.ppl_ratio.differs_from(1.0) is False
        ratio = f' <span class="times">{esc(formatting.times(one.ppl_ratio.mean))}</span>'
        ratio += ' <span class="soft">no difference</span>' if unsure else ""
    below = ' <span class="soft">below noise floor</span>' if one.below_floor else ""
    return [
        swatch(colour) + code(cell.label),
        esc(one.words),
        sized(formatting.megabytes(size, unit=False), size) + _beside(formatting.amount(one.size_ratio)),
        sized(formatting.figure(cell.latency.decode_tok_s), cell.latency.decode_tok_s) + _speed(one),
        _with_error(one.kl) + below,
        sized(small(one.floor.mean, 2), one.floor.mean) if one.floor else formatting.NONE,
        _with_error(one.ppl, plain=True) + ratio,
        _share(one.agreement),
    ]


def _speed(one: Verdict) -> str:
    """The ratio of speeds: in words where the runs carry it, else in grey."""
    mark = devices.MARK if one.across else ""
    if one.speed_carried:
        return _beside(formatting.pace(one.speed_ratio) + mark)
    return f' <span class="times">{esc(formatting.times(one.speed_ratio, mark))}</span>'


def _beside(text: str) -> str:
    return f' <span class="versus">{esc(text)}</span>' if text else ""


def _with_error(estimate: Estimate | None, plain: bool = False) -> str:
    if estimate is None:
        return formatting.NONE
    write = formatting.figure if plain else small
    error = (
        ""
        if estimate.se is None
        else f" ± {small(estimate.se, 1) if not plain else formatting.figure(estimate.se)}"
    )
    bound = "≥ " if estimate.at_least else ""
    return sized(f"{bound}{write(estimate.mean)}{error}", estimate.mean)


def _share(estimate: Estimate | None) -> str:
    if estimate is None:
        return formatting.NONE
    error = "" if estimate.se is None else f" ± {estimate.se * 100:.1f}"
    return sized(f"{estimate.mean * 100:.1f}{error} %", estimate.mean)


def refusals(comparison: Comparison) -> str:
    """Why fidelity was not measured, for each column without it."""
    lines = [
        f"<li>{code(cell.label)} {esc(cell.fidelity.refused)}</li>"
        for cell in comparison.cells
        if cell.fidelity and cell.fidelity.refused
    ]
    return f'<h3>Not measured</h3><ul class="plain">{"".join(lines)}</ul>' if lines else ""


# ---------------------------------------------------------------- the longer text


def text_table(comparison: Comparison) -> str:
    """All figures of the evaluation text; "" if none was scored."""
    if not verdict.on_text(comparison):
        return ""
    colour_of = style.comparison_colours(comparison)
    rows = [
        _text_row(cell, colour_of[cell.variant])
        for cell in comparison.cells
        if verdict.figure(cell, "tokens")
    ]
    return table(
        TEXT_HEADS, rows, caption="On the evaluation text", numeric=range(1, 13), name="fidelity-text"
    )


def _text_row(cell: CellResult, colour: str) -> list[str]:
    def pair(*path: str, scale: float = 1.0, unit: str = "") -> str:
        mean, se = verdict.figure(cell, *path[:-1], path[-1]), verdict.figure(cell, *_error_of(path))
        if mean is None:
            return formatting.NONE
        error = "" if se is None else f" ± {small(se * scale, 1)}"
        return sized(f"{small(mean * scale)}{error}{unit}", mean)

    def one(*path: str) -> str:
        value = verdict.figure(cell, *path)
        return sized(small(value), value)

    return [
        swatch(colour) + code(cell.label),
        pair("kl", "mean"),
        one("kl", "median"),
        one("kl", "p90"),
        one("kl", "p99"),
        one("kl", "p999"),
        one("kl", "max"),
        pair("kl_reverse", "mean"),
        pair("delta_p", "mean", scale=100, unit=" pp"),
        pair("delta_p", "rms", scale=100, unit=" pp"),
        pair("ppl_ratio"),
        one("log_p_correlation"),
        pair("top5_overlap", scale=100, unit=" %"),
    ]


def _error_of(path: tuple[str, ...]) -> tuple[str, ...]:
    """The key of a figure's standard error: mean → se, rms → rms_se, ppl_ratio → ppl_ratio_se."""
    return (*path[:-1], "se" if path[-1] == "mean" else f"{path[-1]}_se")
