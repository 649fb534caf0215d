"""A comparison and its layers as tables for a terminal. Text only: knows nothing of options or events."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from comparator import devices, figures, words
from comparator.report import column_name, shape_text
from comparator.types import Comparison, LayerRow


def comparison_table(comparison: Comparison, keys: tuple[str, ...] = figures.KEY) -> str:
    """The comparison table for a terminal: a line a column, then notes and problems."""
    shown = figures.present(comparison, keys)
    rows = [["", *(f.title for f in shown)], ["", *(f.unit for f in shown)]]
    for cell in comparison.cells:
        row = [column_name(comparison, cell)]
        row += [f"{f.written(cell)} {figures.beside(comparison, cell, f)}".strip() for f in shown]
        rows.append([printable(value) for value in row])
    widths = [max(len(row[i]) for row in rows) for i in range(len(shown) + 1)]
    lines = [
        "  ".join(
            v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(2, "  ".join("─" * width for width in widths))
    unlike = devices.unlike(comparison.cells)
    head = textwrap.fill(printable(unlike), 106, break_on_hyphens=False) + "\n\n" if unlike else ""
    return head + "\n".join(line.rstrip() for line in lines) + "\n" + "".join(_below(comparison))


def _below(comparison: Comparison) -> Iterable[str]:
    """Problems and notes, a paragraph a column; what every column notes stands once."""
    worked = [cell for cell in comparison.cells if cell.status != "failed"]
    shared = (
        [n for n in worked[0].notes if all(n in cell.notes for cell in worked)] if len(worked) > 1 else []
    )
    paragraphs = [("all columns", shared)]
    for cell in comparison.cells:
        error = [cell.error.problem, cell.error.advice] if cell.error else []
        paragraphs.append((cell.label, [*error, *(note for note in cell.notes if note not in shared)]))
    for name, said in paragraphs:
        if any(said):
            yield f"\n{printable(name)}\n"
            for text in filter(None, said):
                wrapped = textwrap.wrap(printable(text), 106, break_on_hyphens=False, break_long_words=False)
                yield "".join(f"  {line}\n" for line in wrapped)


def printable(text: str) -> str:
    """Without control characters: a document from elsewhere shall not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def layers_table(rows: Iterable[LayerRow]) -> str:
    """The layers for a terminal: a line a stored tensor."""
    header = (
        "name",
        "module",
        "means",
        "stored as",
        "shape",
        "stored shape",
        "bytes",
        "quant state",
        "bits",
        "note",
    )
    table = [header] + [
        (
            printable(row.name),
            printable(row.module_class),
            row.logical_dtype,
            row.storage_dtype,
            shape_text(row.shape),
            shape_text(row.storage_shape),
            words.count(row.bytes),
            words.count(row.quant_state_bytes),
            words.figure(row.bits_per_weight),
            f"= {printable(row.tied_to)}" if row.tied_to else "",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    right = {6, 7, 8}
    return "\n".join(
        "  ".join(v.rjust(w) if i in right else v.ljust(w) for i, (v, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in table
    )  # fmt: skip
