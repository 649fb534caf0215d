"""Tables of the command line, drawn with rich: they fit a terminal of any width, and are plain text in a pipe or file."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from comparator.core import devices
from comparator.core.result import Comparison, LayerRow
from comparator.metrics.definitions import Place, present
from comparator.reporting import prompt_set, votes
from comparator.reporting.ratios import beside
from comparator.reporting.summary import column_name, shape_text
from comparator.util import formatting

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PROSE = 106  # characters in a line of text at most
MOST_FLIPS = 20  # prompts that are listed; reports have all
UNLIMITED = 100_000  # a line of a table in a pipe is never broken
# Columns of the layers table: (heading, right-aligned, text of a row), and their order of importance.
_LAYER_COLUMNS: tuple[tuple[str, bool, Any], ...] = (
    ("name", False, lambda row: row.name),
    ("module", False, lambda row: row.module_class),
    ("means", False, lambda row: row.logical_dtype),
    ("stored as", False, lambda row: row.storage_dtype),
    ("shape", False, lambda row: shape_text(row.shape)),
    ("stored shape", False, lambda row: shape_text(row.storage_shape)),
    ("bytes", True, lambda row: formatting.count(row.bytes)),
    ("quant state", True, lambda row: formatting.count(row.quant_state_bytes)),
    ("bits", True, lambda row: formatting.figure(row.bits_per_weight)),
    ("note", False, lambda row: f"= {row.tied_to}" if row.tied_to else ""),
)
_IMPORTANCE = (
    "name",
    "stored as",
    "means",
    "bytes",
    "bits",
    "quant state",
    "shape",
    "stored shape",
    "module",
    "note",
)


def printable(text: str) -> str:
    """`text` without control characters, with which a document could steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in text)


def terminal_width() -> int:
    """Characters in a line of stdout; unlimited where it is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED


def prose_width() -> int:
    """Characters in a line of text: those of the terminal, between 60 and PROSE."""
    return max(60, min(shutil.get_terminal_size().columns, PROSE))


def to_text(*parts: RenderableType, width: int | None = None) -> str:
    """Rich renderables as text, with styles on a terminal alone; strings are taken as they are, without markup."""
    from rich.console import Console

    console = Console(
        file=io.StringIO(), width=width or terminal_width(), force_terminal=sys.stdout.isatty(), markup=False,
        highlight=False, emoji=False, legacy_windows=False,
    )  # fmt: skip
    for part in parts:
        console.print(part)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def answer(comparison: Comparison) -> str:
    """Which column to take, and why; "" where there is nothing to choose from."""
    from rich.text import Text

    from comparator.fidelity.verdict import reference_cell
    from comparator.reporting.recommendation import recommend

    recommended = recommend(comparison.cells, reference_cell(comparison), prompt_set.summaries(comparison))
    if recommended is None:
        return ""
    sentence = Text(printable(f"\n{recommended.sentence}"), style="bold")
    return to_text(
        sentence, *(Text(printable(f"  {line}")) for line in recommended.lines), width=prose_width()
    )


def length_table(comparison: Comparison) -> str:
    """Divergence over the length of the evaluation text; "" where there is no such figure."""
    from rich.text import Text

    from comparator.fidelity import length

    columns = length.measured(comparison)
    if not columns:
        return ""
    table = plain_table()
    table.add_column("tokens read")
    for cell, _ in columns:
        table.add_column(f"{printable(cell.label)} KL, nats", justify="right")
        table.add_column("agrees", justify="right")
    for number, bucket in enumerate(columns[0][1]):
        row = [f"{bucket.low + 1:,} to {bucket.high:,}"]
        for _, buckets in columns:
            if number < len(buckets):
                row += [formatting.small(buckets[number].kl), formatting.percent(buckets[number].agree)]
        table.add_row(*row)
    return to_text(Text("Over the length of the text, by how many tokens were read before:"), table, "")


def prompt_set_table(comparison: Comparison) -> str:
    """A line per column of a prompt set, and the prompts whose check flipped; "" without a set."""
    if comparison.prompt_set is None:
        return ""
    table = rows_table(prompt_set.SUMMARY_HEAD, prompt_set.summary_rows(comparison))
    head, lines = prompt_set.score_table(comparison)
    scores = [rows_table(head, lines), ""] if lines else []
    flipped = [row for row in prompt_set.rows(comparison) if any(row.flips)]
    return to_text(
        "", printable(prompt_set.title(comparison)), *scores, table, *_flipped(comparison, flipped)
    )


def votes_table(comparison: Comparison) -> str:
    """Win rates of the columns by blind votes, of everybody and of each visitor; "" without a vote."""
    from rich.text import Text

    if not votes.title(comparison):
        return ""
    visitors = votes.visitor_rows(comparison)
    parts = [rows_table(votes.HEAD, votes.totals(comparison))]
    if len(visitors) > 1:
        parts += ["", rows_table(votes.visitor_head(comparison), visitors)]
    return to_text("", printable(votes.title(comparison)), *parts) + to_text(
        Text(votes.RULE), width=prose_width()
    )


def judges_table(comparison: Comparison) -> str:
    """What each judge model said of the columns; "" without one."""
    from rich.text import Text

    judges = comparison.votes.judges if comparison.votes else ()
    text = ""
    for judge in judges:
        text += to_text("", printable(votes.judge_title(judge)))
        if totals := votes.judge_totals(comparison, judge):
            text += to_text(rows_table(votes.HEAD, totals))
        text += to_text(
            *(Text(printable(line)) for line in votes.judge_sentences(comparison, judge)), width=prose_width()
        )
    return text + (to_text(Text(votes.JUDGE_RULE), width=prose_width()) if judges else "")


def rows_table(head: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table of texts under its heads; the first column has the names."""
    safe = [tuple(map(printable, row)) for row in rows]
    columns = [(printable(title), [row[n] for row in safe]) for n, title in enumerate(head) if n]
    return _table([head[0], *(row[0] for row in safe)], columns)


def _flipped(comparison: Comparison, rows: list[prompt_set.Row]) -> list[str]:
    """A line per prompt whose check flipped, MOST_FLIPS at most."""
    lines = []
    for row in rows[:MOST_FLIPS]:
        how = (
            f"{cell.label} {'right→wrong' if flip == 'worse' else 'wrong→right'}"
            for cell, flip in zip(comparison.cells, row.flips, strict=True)
            if flip
        )
        lines.append(
            printable(f"  {row.prompt.id}: {', '.join(how)}: {prompt_set.shortly(row.prompt.prompt, 60)}")
        )
    rest = [f"  and {len(rows) - MOST_FLIPS:,} more"] if len(rows) > MOST_FLIPS else []
    return ["Flipped against the reference:", *lines, *rest] if rows else []


def pairs(rows: Iterable[tuple[str, str]], indent: int = 0) -> RenderableType:
    """(name, text) in two columns without a heading; the text wraps within its own."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for name, text in rows:
        grid.add_row(Text(printable(name)), Text(printable(text)))
    return Padding(grid, (0, 0, 0, indent))


def comparison_table(comparison: Comparison, place: Place = "key") -> str:
    """A line per column of the comparison, then notes and problems.

    Metrics that do not fit the terminal's width beside the others follow in further tables.
    """
    from rich.text import Text

    names = [printable(column_name(comparison, cell)) for cell in comparison.cells]
    columns = [
        (f"{metric.title}\n{metric.unit_and_direction}",
         [f"{metric.format(cell)} {beside(comparison, cell, metric)}".strip() for cell in comparison.cells])
        for metric in present(comparison, place)
    ]  # fmt: skip
    unlike = devices.unlike(comparison.cells)
    head = to_text(Text(printable(unlike)), "", width=prose_width()) if unlike else ""
    return head + in_blocks(names, columns) + "".join(_notes(comparison))


def in_blocks(names: list[str], columns: list[tuple[str, list[str]]]) -> str:
    """A table of columns (heading, texts) beside the names; those that do not fit the terminal's width follow in further
    tables."""
    tables = [_table(["", *names], block) for block in _blocks(names, columns)]
    return "\n".join(to_text(table) for table in tables)


def _blocks(names: list[str], columns: list[tuple[str, list[str]]]) -> list[list[tuple[str, list[str]]]]:
    """The columns (heading, texts) in as few tables as fit the terminal's width beside the names."""
    blocks: list[list[tuple[str, list[str]]]] = [[]]
    available = terminal_width() - min(max(map(len, names), default=0), terminal_width() // 2)
    used = 0
    for heading, texts in columns:
        width = 2 + max(map(len, [*heading.split("\n"), *texts]))
        if blocks[-1] and used + width > available:
            blocks.append([])
            used = 0
        blocks[-1].append((heading, texts))
        used += width
    return blocks


def plain_table() -> Table:
    """An empty table with bold headings above a line, as all tables of the command line look."""
    from rich import box
    from rich.table import Table

    return Table(
        box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold"
    )


def _table(names: list[str], columns: list[tuple[str, list[str]]]) -> Table:
    from rich.text import Text

    table = plain_table()
    table.add_column(names[0], overflow="fold", max_width=terminal_width() // 2)
    for heading, _ in columns:
        table.add_column(Text(heading), justify="right", no_wrap=True)
    for name, *values in zip(names[1:], *(texts for _, texts in columns), strict=True):
        table.add_row(Text(name), *(Text(value) for value in values))
    return table


def _notes(comparison: Comparison) -> Iterable[str]:
    """Problems and notes, a paragraph per column; notes of every column come first, once."""
    from rich.padding import Padding
    from rich.text import Text

    worked = [cell for cell in comparison.cells if cell.status != "failed"]
    shared = (
        [n for n in worked[0].notes if all(n in cell.notes for cell in worked)] if len(worked) > 1 else []
    )
    paragraphs = [("all columns", shared)]
    for cell in comparison.cells:
        error = [cell.error.problem, cell.error.advice] if cell.error else []
        paragraphs.append((cell.label, [*error, *(note for note in cell.notes if note not in shared)]))
    for name, texts in paragraphs:
        if any(texts):
            lines = [Padding(Text(printable(text)), (0, 0, 0, 2)) for text in texts if text]
            yield to_text("", Text(printable(name)), *lines, width=prose_width())


def layers_table(rows: Iterable[LayerRow]) -> str:
    """A line per stored tensor. Columns that do not fit the terminal's width are left out, which a last line says."""
    from rich.text import Text

    rows = list(rows)
    cells = {head: [printable(str(get(row))) for row in rows] for head, _, get in _LAYER_COLUMNS}
    widths = {head: max(map(len, [head, *texts])) + 2 for head, texts in cells.items()}
    available, fitting = terminal_width(), []
    for head in _IMPORTANCE:
        if (available := available - widths[head]) < -2 and fitting:
            break
        fitting.append(head)
    table = plain_table()
    shown = [(head, right) for head, right, _ in _LAYER_COLUMNS if head in fitting]
    for head, right in shown:
        table.add_column(head, justify="right" if right else "left", overflow="fold")
    for texts in zip(*(cells[head] for head, _ in shown), strict=True):
        table.add_row(*map(Text, texts))
    left_out = [head for head in cells if head not in fitting]
    more = f"Not shown at this width: {', '.join(left_out)}." if left_out else ""
    return to_text(table, *([more] if more else []))
