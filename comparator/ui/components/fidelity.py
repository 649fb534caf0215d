"""The Fidelity tab: how far each column's predictions are from the reference's, and where that comes from."""

from __future__ import annotations

import gradio as gr

from comparator import devices, plots, plots_fidelity, verdict, words
from comparator.types import CellResult, Comparison, PromptFidelity, TopToken
from comparator.ui.components import sensitivity
from comparator.ui.markup import code, compared, esc, note, sized, swatch, table
from comparator.ui.page import PRIVATE, Choice, Page, picture
from comparator.ui.state import Shown
from comparator.verdict import Estimate, Verdict
from comparator.words import small

MOST_TOKENS = 1024  # coloured at once
STEPS = (0.01, 0.05, 0.2, 0.5, 1.0)  # nats where one colour ends and the next begins

VERDICT_HEADS = (
    ("Column", ""),
    ("Verdict", "the rule is written below the table"),
    ("Size, MB", "weights and quant state; MB are 10^6 bytes"),
    ("Speed, tok/s", "× is the ratio to the reference"),
    ("KL, nats", "mean KL divergence from the reference, ± its standard error"),
    ("Noise floor", "the column against itself, the text fed in chunks of 64: rounding alone"),
    ("Perplexity", "of the evaluation text, ± its standard error"),
    ("Agrees", "how often both put the same token first, ± its standard error"),
)
TEXT_HEADS = (
    ("Column", ""),
    ("KL mean", "KL(reference ‖ column) in nats, ± its standard error"),
    ("median", ""),
    ("90 %", "90th percentile"),
    ("99 %", "99th percentile"),
    ("99.9 %", "99.9th percentile"),
    ("maximum", ""),
    ("Reverse KL", "KL(column ‖ reference), mean ± its standard error"),
    ("Δp mean", "change of the probability of the token that came next, in percentage points"),
    ("Δp RMS", "root mean square of that change"),
    ("PPL ratio", "perplexity over the reference's, ± its standard error"),
    ("Correlation", "of the two columns' log-probabilities"),
    ("Top-5 overlap", "share of the reference's five first tokens that are among this column's five first"),
)
TOKEN_HEADS = (
    ("#", "place in the answer"),
    ("Token", "of the reference's answer"),
    ("KL, nats", ""),
    ("p here", "probability that this column gives to the token"),
    ("p reference", "probability that the reference gives to it"),
    ("Rank here", "0: it is this column's first choice"),
    ("First choices here", ""),
    ("First choices of the reference", ""),
)


def build(page: Page) -> None:
    with gr.Tab("Fidelity", id="fidelity"):
        intro = gr.HTML(
            note(
                "Run a comparison of two columns or more to see how far their predictions are from the reference's."
            ),
            apply_default_css=False,
        )
        verdicts = gr.HTML("", elem_id="fidelity-verdict", apply_default_css=False)
        with gr.Row(elem_classes="plots", visible=False) as pictures:
            scatter = picture("Memory against divergence")
            lines = picture("Divergence by token")
        text = gr.HTML("", elem_id="fidelity-text", apply_default_css=False)
        with gr.Row(elem_classes="controls", visible=False) as controls:
            column = Choice([], label="Column", filterable=False, elem_id="fidelity-column")
        tokens = gr.HTML("", elem_id="fidelity-tokens", apply_default_css=False)
        with gr.Row(elem_classes="plots one", visible=False) as map_row:
            heat = picture("Weight error by layer and module")
        sensitivity.build(page)
        page.on_comparison(show, [intro, verdicts, pictures, scatter, lines, text, controls, column])
        gr.on(
            [page.shown.change, column.change],
            view, inputs=[page.shown, column], outputs=[tokens, map_row, heat], trigger_mode="always_last", **PRIVATE,
        )  # fmt: skip


def show(shown: Shown):
    comparison = shown.comparison
    if comparison is None:
        return tuple(gr.skip() for _ in range(8))
    names = measured(comparison)
    if not any(c.fidelity for c in comparison.cells):
        return (
            note(esc(why_nothing(comparison))), "", gr.Row(visible=False), gr.skip(), gr.skip(), "",
            gr.Row(visible=False), gr.Dropdown(choices=[], value=None),
        )  # fmt: skip
    return (
        note(esc(explained(comparison))),
        verdict_table(comparison) + refusals(comparison),
        gr.Row(visible=True),
        plots_fidelity.trade_off(comparison),
        plots_fidelity.kl_by_token(comparison),
        text_table(comparison),
        gr.Row(visible=bool(names)),
        gr.Dropdown(choices=names, value=most_divergent(comparison, names)),
    )


def measured(comparison: Comparison) -> list[str]:
    """Columns that have something to show token by token or layer by layer; the reference last."""
    found = [
        c for c in comparison.cells if (c.fidelity and c.fidelity.prompt) or any(r.error for r in c.layers)
    ]
    return [c.label for c in sorted(found, key=lambda c: c is verdict.reference_of(comparison, c))]


def most_divergent(comparison: Comparison, names: list[str]) -> str | None:
    """What is looked at first: the column that is furthest from the reference."""
    far = {c.label: found.mean for c in comparison.cells if (found := verdict.divergence(c))}
    return max(names, key=lambda name: far.get(name, -1.0)) if names else None


def why_nothing(comparison: Comparison) -> str:
    if len(comparison.cells) < 2:
        return "One column alone has nothing to be compared with. Tick a second variant and press Run."
    return "Fidelity was not measured in this comparison. Choose it under Settings and press Run."


def explained(comparison: Comparison) -> str:
    name = comparison.reference
    reference = name.variant + (f" + {name.adapter}" if name.adapter else "") if name else "the reference"
    cell = next((c for c in comparison.cells if verdict.figure(c, "tokens") is not None), None)
    said = (
        f"Every column scored the answer of {reference}, token by token, the way it decodes. KL divergence says how "
        "far its probabilities are from the reference's, in nats: 0 is the same, 0.1 is easy to notice, 1 is "
        "another model."
    )
    if cell is None:
        return f"{said} These figures are from one answer; for an average, choose “and a longer text” under Settings."
    tokens, context, stride = (verdict.figure(cell, key) for key in ("tokens", "context", "stride"))
    title = cell.fidelity.text.get("name")
    how = (
        f", context {context:,.0f}, stride {stride:,.0f}, one window at a time" if context and stride else ""
    )
    return f"{said} Averages are over {tokens:,.0f} tokens of {title if isinstance(title, str) else 'a text'}{how}."


# ---------------------------------------------------------------- the verdict


def verdict_table(comparison: Comparison) -> str:
    named = plots.comparison_colours(comparison)
    rows = [_verdict_row(v, named[v.cell.variant]) for v in verdict.verdicts(comparison)]
    return (
        table(VERDICT_HEADS, rows, caption="The verdict", numeric=range(2, 8), name="fidelity-verdict")
        + f'<p class="foot"><b>The rule.</b> {esc(verdict.RULE)}</p>'
    )


def _verdict_row(one: Verdict, colour: str) -> list[str]:
    cell = one.cell
    size = verdict.size(cell)
    told = "" if one.speed_told or one.speed_ratio is None else ' <span class="soft">can’t tell</span>'
    ratio = ""
    if one.ppl_ratio is not None:
        unsure = one.ppl_ratio.differs_from(1.0) is False
        ratio = f' <span class="times">{esc(words.times(one.ppl_ratio.mean))}</span>'
        ratio += ' <span class="soft">can’t tell</span>' if unsure else ""
    below = ' <span class="soft">below its floor</span>' if one.below_floor else ""
    return [
        swatch(colour) + code(cell.label),
        esc(one.words),
        compared(words.megabytes(size, unit=False), one.size_ratio, key=size),
        compared(
            words.figure(cell.latency.decode_tok_s),
            one.speed_ratio,
            key=cell.latency.decode_tok_s,
            mark=devices.MARK if one.across else "",
        )
        + told,
        _with_error(one.kl) + below,
        sized(small(one.floor.mean, 2), one.floor.mean) if one.floor else words.NONE,
        _with_error(one.ppl, plain=True) + ratio,
        _share(one.agreement),
    ]


def _with_error(found: Estimate | None, plain: bool = False) -> str:
    if found is None:
        return words.NONE
    write = words.figure if plain else small
    error = "" if found.se is None else f" ± {small(found.se, 1) if not plain else words.figure(found.se)}"
    return sized(f"{write(found.mean)}{error}", found.mean)


def _share(found: Estimate | None) -> str:
    if found is None:
        return words.NONE
    error = "" if found.se is None else f" ± {found.se * 100:.1f}"
    return sized(f"{found.mean * 100:.1f}{error} %", found.mean)


def refusals(comparison: Comparison) -> str:
    """Why a column has no fidelity, where it has none."""
    lines = [
        f"<li>{code(cell.label)} {esc(cell.fidelity.refused)}</li>"
        for cell in comparison.cells
        if cell.fidelity and cell.fidelity.refused
    ]
    return f'<h3>Not measured</h3><ul class="plain">{"".join(lines)}</ul>' if lines else ""


# ---------------------------------------------------------------- the longer text


def text_table(comparison: Comparison) -> str:
    """Every figure of the longer text; "" where none was scored."""
    if not verdict.on_text(comparison):
        return ""
    named = plots.comparison_colours(comparison)
    rows = [
        _text_row(cell, named[cell.variant]) for cell in comparison.cells if verdict.figure(cell, "tokens")
    ]
    return table(TEXT_HEADS, rows, caption="On the longer text", numeric=range(1, 13), name="fidelity-text")


def _text_row(cell: CellResult, colour: str) -> list[str]:
    def pair(*path: str, scale: float = 1.0, unit: str = "") -> str:
        mean, se = verdict.figure(cell, *path[:-1], path[-1]), verdict.figure(cell, *_error_of(path))
        if mean is None:
            return words.NONE
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
    """Where a figure's standard error stands: mean → se, rms → rms_se, ppl_ratio → ppl_ratio_se."""
    return (*path[:-1], "se" if path[-1] == "mean" else f"{path[-1]}_se")


# ---------------------------------------------------------------- token by token, layer by layer


def view(shown: Shown, name: str | None):
    """(tokens, whether there is a heat map, the heat map) of the chosen column."""
    comparison = shown.comparison
    cell = next((c for c in comparison.cells if c.label == name), None) if comparison else None
    if cell is None:
        return "", gr.Row(visible=False), gr.skip()
    prompt = cell.fidelity.prompt if cell.fidelity else None
    tokens = coloured(cell, prompt) + token_table(prompt) if prompt and prompt.tokens else ""
    if not plots_fidelity.layer_grid(cell)[1]:
        return tokens, gr.Row(visible=False), gr.skip()
    return tokens, gr.Row(visible=True), plots_fidelity.layer_map(cell)


def coloured(cell: CellResult, prompt: PromptFidelity) -> str:
    """The reference's answer, each token as dark as this column's divergence at it; hover for both top fives."""
    spans = []
    for number, token in enumerate(prompt.tokens[:MOST_TOKENS]):
        kl = _at(prompt.kl, number)
        first = " first" if number == prompt.first_difference else ""
        spans.append(
            f'<span class="tok k{level(kl)}{first}" title="{esc(hover(prompt, number))}">{esc(token)}</span>'
        )
    rest = len(prompt.tokens) - MOST_TOKENS
    more = note(f"{rest:,} more tokens are in the table.") if rest > 0 else ""
    return (
        f"<h3>The reference’s answer, as {code(cell.label)} sees it</h3>"
        + note(esc(differs(prompt)))
        + f'<div class="tokens" tabindex="0" role="region" aria-label="The answer, coloured by divergence">'
        f"{''.join(spans)}</div>{legend()}{more}"
    )


def differs(prompt: PromptFidelity) -> str:
    first = prompt.first_difference
    if first is None or not 0 <= first < len(prompt.tokens):
        return "At every token both put the same one first. Hover a token for the five first choices of both columns."
    return (
        f"The two first disagree on which token comes first at token {first + 1} of {len(prompt.tokens)} (outlined). "
        "Hover a token for the five first choices of both columns."
    )


def level(kl: float | None) -> int:
    """0 (the same) to 5 (far apart)."""
    return 0 if kl is None else sum(kl >= step for step in STEPS)


def legend() -> str:
    names = [f"below {STEPS[0]:g}", *(f"from {step:g}" for step in STEPS)]
    items = "".join(f'<span class="tok k{n}">{esc(name)}</span>' for n, name in enumerate(names))
    return f'<p class="foot token-legend">KL in nats: {items}</p>'


def hover(prompt: PromptFidelity, number: int) -> str:
    """What stands behind one token: divergence, probabilities, rank, and the five first choices of both."""
    kl, p, reference_p, rank = (
        _at(values, number) for values in (prompt.kl, prompt.p, prompt.reference_p, prompt.rank)
    )
    lines = [
        f"token {number + 1}: KL {small(kl)} nats"
        + (", first difference" if number == prompt.first_difference else "")
    ]
    lines.append(
        f"p here {_percent(p)} (rank {words.NONE if rank is None else rank}), reference {_percent(reference_p)}"
    )
    for title, tops in (("here", prompt.top), ("reference", prompt.reference_top)):
        lines.append(f"{title}: {choices(_at(tops, number))}")
    return "\n".join(lines)


def choices(found: tuple[TopToken, ...] | None) -> str:
    return ", ".join(f"{_visible(t.token)} {_percent(t.p)}" for t in found or ()) or words.NONE


def _visible(token: str) -> str:
    return "“" + token.replace("\n", "⏎").replace("\t", "⇥") + "”"


def _percent(value: float | None) -> str:
    if value is None:
        return words.NONE
    return f"{value * 100:.1f} %" if value >= 0.0005 else "<0.1 %"


def _at(values: tuple, number: int):
    """A document may hold lists of unequal length."""
    return values[number] if number < len(values) else None


def token_table(prompt: PromptFidelity) -> str:
    rows = [
        [
            sized(str(number + 1), number),
            f"<code>{esc(_visible(token))}</code>",
            sized(small(_at(prompt.kl, number)), _at(prompt.kl, number)),
            sized(_percent(_at(prompt.p, number)), _at(prompt.p, number)),
            sized(_percent(_at(prompt.reference_p, number)), _at(prompt.reference_p, number)),
            esc(_at(prompt.rank, number) if _at(prompt.rank, number) is not None else words.NONE),
            esc(choices(_at(prompt.top, number))),
            esc(choices(_at(prompt.reference_top, number))),
        ]
        for number, token in enumerate(prompt.tokens)
    ]
    inner = table(TOKEN_HEADS, rows, caption="Token by token", numeric=(2, 3, 4, 5), name="fidelity-tokens")
    return f'<details class="behind"><summary>The same as a table</summary>{inner}</details>'
