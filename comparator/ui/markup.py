"""Pieces of HTML, from jinja2 templates with autoescape (comparator/ui/templates).

`render` escapes every value. The functions below it return and take HTML as `str`, so that pieces can be put together;
what is text in their arguments is escaped, what is HTML says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup, escape

from comparator.util import formatting
from comparator.util.templates import environment

_TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, **values: Any) -> str:
    """A template of comparator/ui/templates as HTML, every value escaped."""
    return str(environment(_TEMPLATES).get_template(template).render(values))


def _fragment(name: str, *values: Any) -> str:
    return str(getattr(environment(_TEMPLATES).get_template("fragments.html").module, name)(*values))


def esc(value: object) -> str:
    """Text as HTML: safe between tags and inside a quoted attribute."""
    return str(escape(str(value)))


def swatch(colour: str) -> str:
    """The square in a column's colour."""
    return _fragment("swatch", colour)


def code(text: str) -> str:
    """A notation, in a monospaced face."""
    return _fragment("code", text)


def bar(percent: float, colour: str) -> str:
    """A bar of that share of its place, decoration beside the value."""
    return _fragment("bar", percent, colour)


def note(html: str, kind: str = "") -> str:
    """A paragraph set apart, from HTML."""
    return _fragment("note", Markup(html), kind)


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

    head: (heading, explanation or ""), text. rows: cells as HTML; the first of each row is its heading. numeric: the
    columns whose values are right-aligned. name: tells two tables of a page apart.
    """
    cells = [[Markup(cell) for cell in row] for row in rows]
    return _fragment("table_of", head, cells, caption, set(numeric), name, sortable)


def sized(value: str, key: float | None = None) -> str:
    """A value in a table cell, with the number it sorts by where that is not the text itself."""
    return _fragment("sized", value, key)


def compared(value: str, share: float | None, key: float | None = None, mark: str = "") -> str:
    """A value with its ratio to the reference beside it, and a mark on that."""
    return _fragment("compared", value, formatting.times(share, mark), key)
