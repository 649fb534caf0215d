"""Small pieces of HTML. Every string that comes from outside goes through `esc`; knows nothing of gradio."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from comparator import words


def esc(value: object) -> str:
    """Text as text: safe between tags and inside a quoted attribute."""
    return escape(str(value), quote=True)


def swatch(colour: str) -> str:
    return f'<span class="swatch" style="--c:{esc(colour)}" aria-hidden="true"></span>'


def code(text: str) -> str:
    return f'<code class="notation">{esc(text)}</code>'


def bar(share: float | None, colour: str) -> str:
    """A bar as wide as `share` (0..1) of its cell; nothing where there is no figure."""
    width = 0.0 if share is None else max(0.0, min(1.0, share)) * 100
    return f'<span class="bar" aria-hidden="true"><i style="width:{width:.1f}%;--c:{esc(colour)}"></i></span>'


def note(html: str, kind: str = "") -> str:
    """A paragraph set apart; `html` is markup, already escaped."""
    return f'<p class="note {kind}">{html}</p>'


def table(
    head: Sequence[tuple[str, str]],
    rows: Iterable[Sequence[str]],
    *,
    caption: str,
    numeric: Iterable[int] = (),
    sortable: bool = True,
    name: str = "",
) -> str:
    """A table that scrolls inside itself, sorts by its headings and copies as tab-separated text.

    `head` holds (heading, explanation or ""); cells are markup, already escaped; `numeric` are the columns whose
    figures are right-aligned; the first cell of each row is its heading. `name` tells two tables apart.
    """
    right = set(numeric)
    heads = []
    for number, (title, why) in enumerate(head):
        label = f'<span class="why" title="{esc(why)}">{esc(title)}</span>' if why else esc(title)
        inner = (
            f'<button type="button" data-sort="{number}">{label}</button>' if sortable and title else label
        )
        heads.append(f'<th scope="col"{_right(number in right)}>{inner}</th>')
    body = []
    for row in rows:
        cells = "".join(
            f'<th scope="row">{cell}</th>' if number == 0 else f"<td{_right(number in right)}>{cell}</td>"
            for number, cell in enumerate(row)
        )
        body.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="table" data-table="{esc(name)}"><div class="table-bar"><span>{esc(caption)}</span>'
        '<button type="button" class="quiet" data-copy-table>Copy table</button></div>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}"><table>'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{''.join(body)}</tbody></table></div></div>"
    )


def _right(numeric: bool) -> str:
    return ' class="n"' if numeric else ""


def sized(value: str, key: float | None = None) -> str:
    """A figure in a table cell, with the number it sorts by where that is not what is written."""
    return f'<span class="val" data-key="{key!r}">{esc(value)}</span>' if key is not None else esc(value)


def compared(value: str, share: float | None, key: float | None = None, mark: str = "") -> str:
    """A figure with its ratio to the reference beside it, and a mark on that."""
    figure = sized(value, key) if key is not None else f'<span class="val">{esc(value)}</span>'
    return f'{figure} <span class="times">{esc(words.times(share, mark))}</span>'
