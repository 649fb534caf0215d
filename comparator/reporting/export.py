"""A comparison as JSON, CSV, Markdown or HTML.

What was not measured is empty in CSV and "–" everywhere else. Texts come from models and from strangers'
documents: in each format they are data, never markup and never a formula.
"""

from __future__ import annotations

import os
from pathlib import Path

from comparator.core import document
from comparator.core.errors import UserError
from comparator.core.result import Comparison
from comparator.reporting.csv_export import to_csv, to_layers_csv, to_prompts_csv
from comparator.reporting.markdown import to_markdown
from comparator.util import disk

FORMATS = (".json", ".csv", ".layers.csv", ".prompts.csv", ".md", ".html")


def write(comparison: Comparison, path: Path | str) -> Path:
    """Write the report whose kind the file's name says, whole or not at all. Raises `UserError`."""
    path = Path(os.path.expanduser(path))
    write_text(path, render(comparison, path.name))
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; the file that was there before stays until then. Raises `UserError`."""
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe
            path.write_text(text, encoding="utf-8")
            return
        disk.write(path, text.encode("utf-8"), mode=0o666)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror or error}.",
            "Choose another place, or free some space there.",
        ) from None


def check_name(path: Path | str, endings: tuple[str, ...] = FORMATS) -> Path:
    """A path that a report can go to, told before anything is measured. Raises `UserError`."""
    path = Path(os.path.expanduser(path))
    if not path.name.lower().endswith(endings):
        raise UserError(
            f"“{path.name}” has no file ending of a known format.",
            f"Use one of {', '.join(endings)}.",
        )
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(
            f"{path} is a folder." if path.is_dir() else f"There is no folder {path.parent}.",
            "Name a file in an existing folder.",
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"{path} is not writable.", "Choose another place.")
    return path


def render(comparison: Comparison, name: str) -> str:
    """The report as text, by the ending of `name`. Raises `UserError` for an ending that is none of `FORMATS`."""
    name = name.lower()
    if name.endswith(".layers.csv"):
        return to_layers_csv(comparison)
    if name.endswith(".prompts.csv"):
        return to_prompts_csv(comparison)
    for ending, make in {".json": to_json, ".csv": to_csv, ".md": to_markdown, ".html": to_html}.items():
        if name.endswith(ending):
            return make(comparison)
    raise UserError(f"“{name}” has no file ending of a known format.", f"Use one of {', '.join(FORMATS)}.")


def to_json(comparison: Comparison) -> str:
    """The comparison document, indented. `comparator.document.loads` reads it back."""
    return document.dumps(comparison, indent=1) + "\n"


def to_html(comparison: Comparison) -> str:
    """One self-contained page: plots included, readable offline, printable."""
    from comparator.reporting import html as reporting_html

    return reporting_html.page(comparison)


# ---------------------------------------------------------------- CSV


# ---------------------------------------------------------------- what every written report says


# ---------------------------------------------------------------- Markdown
