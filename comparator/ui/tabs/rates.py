"""Tables of win rates, for the parts of the Votes tab."""

from __future__ import annotations

from collections.abc import Sequence

from comparator.core.result import Comparison
from comparator.reporting import votes
from comparator.reporting.plots import style
from comparator.ui.markup import code, esc, swatch, table


def rates_table(comparison: Comparison, rows: Sequence[tuple[str, ...]], caption: str, name: str) -> str:
    """Lines under `votes.HEAD` as HTML, each column in its colour."""
    of_variant = style.comparison_colours(comparison)
    colours = {cell.label: of_variant[cell.variant] for cell in comparison.cells}
    cells = [[swatch(colours[label]) + code(label), *map(esc, rest)] for label, *rest in rows]
    return table(_heads(votes.HEAD), cells, caption=caption, numeric=range(1, len(votes.HEAD)), name=name)


def text_table(
    head: Sequence[str], rows: Sequence[tuple[str, ...]], caption: str, name: str, *, numeric: bool = False
) -> str:
    """Lines of plain text as HTML."""
    cells = [list(map(esc, row)) for row in rows]
    return table(
        _heads(head), cells, caption=caption, numeric=range(1, len(head) if numeric else 1), name=name
    )


def _heads(head: Sequence[str]) -> list[tuple[str, str]]:
    """Headings without explanations, the first two with a capital letter: they are words, the others names or counts."""
    return [(text[:1].upper() + text[1:] if n < 2 else text, "") for n, text in enumerate(head)]
