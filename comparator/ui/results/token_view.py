"""The reference's answer token by token: coloured by a column's KL divergence, and as a table."""

from __future__ import annotations

from comparator.core.result import CellResult, PromptFidelity, TopToken
from comparator.ui.markup import code, esc, note, sized, table
from comparator.util import formatting
from comparator.util.formatting import small

MOST_TOKENS = 1024  # tokens that are coloured; the table has all of them
STEPS = (0.01, 0.05, 0.2, 0.5, 1.0)  # nats, boundaries between colours

BOUND = "a lower bound: the variant reports only its most likely tokens, and all others count as one"
TOKEN_HEADS = (
    ("#", "position in the answer"),
    ("Token", "of the reference's answer"),
    ("KL, nats", ""),
    ("p", "probability of the token under this variant"),
    ("p reference", "its probability under the reference"),
    ("Rank", "0: it is this variant's most likely token"),
    ("Most likely tokens", ""),
    ("Most likely in the reference", ""),
)


def coloured(cell: CellResult, prompt: PromptFidelity) -> str:
    """The reference's answer, each token coloured by this column's KL divergence; the top fives on hover."""
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
        f"<h3>The reference’s answer, scored by {code(cell.label)}</h3>"
        + note(esc(differs(prompt)))
        + f'<div class="tokens" tabindex="0" role="region" aria-label="The answer, coloured by divergence">'
        f"{''.join(spans)}</div>{legend(prompt.at_least and bool(prompt.kl))}{more}"
    )


def differs(prompt: PromptFidelity) -> str:
    first = prompt.first_difference
    if not prompt.forced and first is not None:
        return (
            f"Its own answer is the same up to token {first + 1} of {len(prompt.tokens)} (outlined). It could not be "
            "forced to continue with the reference's tokens, so the rest is not compared."
        )
    if first is None or not 0 <= first < len(prompt.tokens):
        return "Both have the same most likely token at every position. Hover over a token for the five most likely tokens of both."
    return (
        f"The most likely token first differs at token {first + 1} of {len(prompt.tokens)} (outlined). "
        "Hover over a token for the five most likely tokens of both."
    )


def level(kl: float | None) -> int:
    """The colour step of a KL divergence in nats: 0 (same) to 5."""
    return 0 if kl is None else sum(kl >= step for step in STEPS)


def legend(at_least: bool = False) -> str:
    names = [f"below {STEPS[0]:g}", *(f"from {step:g}" for step in STEPS)]
    items = " ".join(f'<span class="tok k{n}">{esc(name)}</span>' for n, name in enumerate(names))
    bound = f" KL is {BOUND}." if at_least else ""
    return f'<p class="foot token-legend">KL in nats: {items}{bound}</p>'


def hover(prompt: PromptFidelity, number: int) -> str:
    """The details of one token: divergence, probabilities, rank, and the five most likely tokens of both."""
    kl, p, reference_p, rank = (
        _at(values, number) for values in (prompt.kl, prompt.p, prompt.reference_p, prompt.rank)
    )
    lines = [
        f"token {number + 1}: KL {'≥ ' if prompt.at_least and kl is not None else ''}{small(kl)} nats"
        + (", first difference" if number == prompt.first_difference else "")
    ]
    lines.append(
        f"p {percent(p)} (rank {formatting.NONE if rank is None else rank}), reference {percent(reference_p)}"
    )
    for title, tops in (("most likely", prompt.top), ("in the reference", prompt.reference_top)):
        lines.append(f"{title}: {choices(_at(tops, number))}")
    return "\n".join(lines)


def choices(tokens: tuple[TopToken, ...] | None) -> str:
    return ", ".join(f"{visible(t.token)} {percent(t.p)}" for t in tokens or ()) or formatting.NONE


def visible(token: str) -> str:
    """A token in quotation marks, its white space visible."""
    return "“" + token.replace("\n", "⏎").replace("\t", "⇥") + "”"


def percent(value: float | None) -> str:
    """A probability: 31.2 %, <0.1 %."""
    if value is None:
        return formatting.NONE
    return f"{value * 100:.1f} %" if value >= 0.0005 else "<0.1 %"


def _at(values: tuple, number: int):
    """A document may hold lists of unequal length."""
    return values[number] if number < len(values) else None


def token_table(prompt: PromptFidelity) -> str:
    rows = [
        [
            sized(str(number + 1), number),
            f"<code>{esc(visible(token))}</code>",
            sized(small(_at(prompt.kl, number)), _at(prompt.kl, number)),
            sized(percent(_at(prompt.p, number)), _at(prompt.p, number)),
            sized(percent(_at(prompt.reference_p, number)), _at(prompt.reference_p, number)),
            esc(_at(prompt.rank, number) if _at(prompt.rank, number) is not None else formatting.NONE),
            esc(choices(_at(prompt.top, number))),
            esc(choices(_at(prompt.reference_top, number))),
        ]
        for number, token in enumerate(prompt.tokens)
    ]
    heads = list(TOKEN_HEADS)
    if prompt.at_least and prompt.kl:
        heads[2] = ("KL ≥, nats", BOUND)
    inner = table(heads, rows, caption="Token by token", numeric=(2, 3, 4, 5), name="fidelity-tokens")
    return f'<details class="behind"><summary>Show as a table</summary>{inner}</details>'
