"""A comparison as JSON, CSV, Markdown or HTML. Knows nothing of a page or of torch.

What was not measured is empty in CSV and "–" everywhere else. Texts come from models and from strangers'
documents: in each format they are data, never markup and never a formula.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparator import devices, document, figures, verdict, words
from comparator.types import CellResult, Comparison, LayerRow, Problem

FORMATS = (".json", ".csv", ".layers.csv", ".md", ".html")


def write(comparison: Comparison, path: Path | str) -> Path:
    """Write the report whose kind the file's name says, whole or not at all. Raises `Problem`."""
    path = Path(os.path.expanduser(path))
    write_text(path, render(comparison, path.name))
    return path


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; what stood there before stays until then. Raises `Problem`."""
    temporary = None
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe
            path.write_text(text, encoding="utf-8")
            return
        with tempfile.NamedTemporaryFile(
            "wb", dir=path.parent, prefix=f".{path.name}.", delete=False
        ) as file:
            temporary = Path(file.name)
            file.write(text.encode("utf-8"))
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        if temporary:
            temporary.unlink(missing_ok=True)
        raise Problem(
            f"{path} cannot be written: {error.strerror or error}.",
            "Choose another place, or free some space there.",
        ) from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def check_name(path: Path | str, endings: tuple[str, ...] = FORMATS) -> Path:
    """A path that a report can go to, told before anything is measured. Raises `Problem`."""
    path = Path(os.path.expanduser(path))
    if not path.name.lower().endswith(endings):
        raise Problem(
            f"“{path.name}” does not say which kind of report it shall be.",
            f"End it in {', '.join(endings)}.",
        )
    if path.is_dir() or not path.parent.is_dir():
        raise Problem(
            f"{path} is a folder." if path.is_dir() else f"There is no folder {path.parent}.",
            "Name a file in a folder that is there.",
        )
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Problem(f"{path} may not be written.", "Choose another place.")
    return path


def render(comparison: Comparison, name: str) -> str:
    """The report as text, by the ending of `name`. Raises `Problem` for an ending that is none of `FORMATS`."""
    name = name.lower()
    if name.endswith(".layers.csv"):
        return to_layers_csv(comparison)
    for ending, make in {".json": to_json, ".csv": to_csv, ".md": to_markdown, ".html": to_html}.items():
        if name.endswith(ending):
            return make(comparison)
    raise Problem(
        f"“{name}” does not say which kind of report it shall be.", f"End it in {', '.join(FORMATS)}."
    )


def to_json(comparison: Comparison) -> str:
    """The comparison document, indented. `comparator.document.loads` reads it back."""
    return document.dumps(comparison, indent=1) + "\n"


def to_html(comparison: Comparison) -> str:
    """One self-contained page: plots included, readable offline, printable."""
    from comparator import report_html

    return report_html.page(comparison)


# ---------------------------------------------------------------- CSV

_FORMULA = re.compile(r"^\s*[=+\-@\t\r＝＋－＠]")


def _cell(value: Any) -> Any:
    """None is empty; numbers stay numbers; a text that a spreadsheet would run gets an apostrophe in front."""
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return value
    text = str(value).replace("\0", "�")
    return f"'{text}" if _FORMULA.match(text) else text


def _csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def to_csv(comparison: Comparison) -> str:
    """One row a column. Every figure in its base unit, its ratio to the reference's beside it."""
    names = ["variant", "adapter", "reference", "status", "problem", "advice", "model", "revision", "kernel",
             "decode_path", "prompt_tokens", "new_tokens", "finish_reason"]  # fmt: skip
    for figure in figures.FIGURES:
        names += [figure.key] + ([f"{figure.key}_ratio"] if figure.ratio else [])
    names += ["notes", "text", "device", "host", "created_at", "id"]
    return _csv(names, (_row(comparison, cell) for cell in comparison.cells))


def _row(comparison: Comparison, cell: CellResult) -> list[Any]:
    model, error, environment = cell.model, cell.error, cell.environment or comparison.environment
    row: list[Any] = [
        cell.variant,
        cell.adapter,
        "yes" if figures.is_reference(comparison.reference, cell) else "no",
        cell.status,
        error.problem if error else None,
        error.advice if error else None,
        model.source if model else comparison.model,
        model.revision if model else None,
        cell.kernel,
        cell.decode_path,
        comparison.prompt.token_count,
        len(cell.token_ids) if cell.finish_reason else None,
        cell.finish_reason,
    ]
    for figure in figures.FIGURES:
        row.append(figure.get(cell))
        if figure.ratio:
            row.append(figures.ratio(comparison, cell, figure))
    return [*row, " | ".join(cell.notes) or None, cell.text or None, environment.device, environment.host,
            comparison.created_at, comparison.id]  # fmt: skip


LAYER_FIELDS = ("name", "module_class", "param_class", "logical_dtype", "storage_dtype", "compute_dtype", "shape",
                "storage_shape", "parameters", "bytes", "quant_state_bytes", "bits_per_weight", "device", "tied_to",
                "adapter_rank")  # fmt: skip


def to_layers_csv(comparison: Comparison, search: str = "") -> str:
    """One row a stored tensor of every column, as it runs and, where the first use changed it, as it was loaded.

    `search` keeps the rows that contain it in a name, a class or a dtype.
    """
    header = ["variant", "adapter", *LAYER_FIELDS, "loaded_storage_dtype", "loaded_storage_shape", "loaded_bytes",
              "loaded_quant_state_bytes"]  # fmt: skip
    rows = (
        [cell.variant, cell.adapter, *(shape_text(getattr(row, f)) for f in LAYER_FIELDS), *_loaded(row)]
        for cell in comparison.cells
        for row in matching(cell.layers, search)
    )
    return _csv(header, rows)


def to_layers_json(comparison: Comparison, search: str = "") -> str:
    """The same rows as a JSON list of objects, with everything that is known of each."""
    rows = [
        {"variant": cell.variant, "adapter": cell.adapter, **asdict(row)}
        for cell in comparison.cells
        for row in matching(cell.layers, search)
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def shape_text(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def _loaded(row: LayerRow) -> list[Any]:
    loaded = row.loaded
    if loaded is None:
        return [None] * 4
    return [loaded.storage_dtype, shape_text(loaded.storage_shape), loaded.bytes, loaded.quant_state_bytes]


def matching(rows: Iterable[LayerRow], search: str) -> list[LayerRow]:
    """The rows that contain every word of `search` in their name, class, dtype or device, whatever the case."""
    wanted = search.lower().split()
    return [
        row
        for row in rows
        if all(
            word
            in f"{row.name} {row.module_class} {row.param_class} {row.storage_dtype} {row.logical_dtype} "
            f"{row.compute_dtype} {row.device}".lower()
            for word in wanted
        )
    ]


# ---------------------------------------------------------------- what every written report says

_STATUS = {"ok": "done", "failed": "failed", "stopped": "stopped"}
_FINISH = {"eos": "the model ended it", "length": "cut at the limit of new tokens", "stopped": "stopped"}


def headline(comparison: Comparison) -> list[tuple[str, str]]:
    """(what, value): where and when it was measured, and with which settings."""
    environment, settings = comparison.environment, comparison.settings
    sampling = "greedy" if settings.temperature == 0 else (
        f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, top-k {settings.top_k}"
    )  # fmt: skip
    if settings.repetition_penalty != 1:
        sampling += f", repetition penalty {settings.repetition_penalty:g}"
    count = comparison.prompt.token_count
    unlike = devices.unlike(comparison.cells)
    return [
        *([("Mind", unlike)] if unlike else []),
        ("Model", comparison.model),
        ("Measured", comparison.created_at),
        ("Device", _device(comparison)),
        ("Processor", environment.cpu or words.NONE),
        ("Driver", environment.driver or words.NONE),
        ("Prompt", f"{words.count(count)} tokens, {'chat template' if comparison.prompt.chat else 'raw text'}"),
        ("Settings", f"{settings.max_new_tokens} new tokens at most, {sampling}, seed {settings.seed}, "
         f"{words.plural(settings.repeats, 'run')}, decode {settings.decode}"),
        ("Packages", ", ".join(f"{n} {v}" for n, v in sorted(environment.packages.items())) or words.NONE),
        ("Python", environment.python or words.NONE),
    ]  # fmt: skip


def _device(comparison: Comparison) -> str:
    """Where the columns ran, each place once."""
    found = [c.environment for c in comparison.cells if c.environment] or [comparison.environment]
    return ", ".join(dict.fromkeys(devices.place(e) for e in found if e.device)) or words.NONE


def state_of(cell: CellResult) -> str:
    """How a column ended, in words."""
    ended = _FINISH.get(cell.finish_reason or "", "")
    return f"{_STATUS[cell.status]}, {words.plural(len(cell.token_ids), 'token')}, {ended}" if ended else _STATUS[
        cell.status
    ]  # fmt: skip


VERDICT_HEAD = (
    "column",
    "size",
    "speed",
    "KL divergence",
    "noise floor",
    "perplexity",
    "same token first",
    "verdict",
)


def verdict_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """One row a column, as text under `VERDICT_HEAD`; none where no fidelity was measured."""
    found = verdict.verdicts(comparison)
    if not any(v.agreement for v in found):
        return []
    return [
        (
            v.cell.label,
            words.times(v.size_ratio) or words.NONE,
            (
                words.times(v.speed_ratio, devices.MARK if v.across else "")
                if v.speed_told or len(v.cell.latency.runs) < 2
                else "can't tell"
            )
            or words.NONE,
            _estimate(v.kl, 1, ".2g"),
            _estimate(v.floor, 1, ".2g"),
            _estimate(v.ppl, 1, ".4g"),
            _estimate(v.agreement, 100, ".1f", " %"),
            v.words,
        )
        for v in found
    ]


def _estimate(estimate: verdict.Estimate | None, scale: float, form: str, unit: str = "") -> str:
    if estimate is None:
        return words.NONE
    error = "" if estimate.se is None else f" ± {estimate.se * scale:.2g}"
    return f"{estimate.mean * scale:{form}}{error}{unit}"


# ---------------------------------------------------------------- Markdown


def to_markdown(comparison: Comparison) -> str:
    """Tables and answers, to paste into an issue."""
    parts = [f"# {_md(comparison.model)}: {_md(', '.join(c.label for c in comparison.cells))}", ""]
    parts += [f"- **{name}**: {_md(value)}" for name, value in headline(comparison) if value != words.NONE]
    if comparison.prompt.system:
        parts += ["", "**System prompt**", "", _fenced(comparison.prompt.system)]
    parts += ["", "**Prompt**", "", _fenced(comparison.prompt.text)]
    for title, keys in (
        ("Comparison", figures.KEY),
        ("Latency", figures.LATENCY),
        ("Memory", figures.MEMORY),
    ):
        parts += ["", f"## {title}", "", *_md_figures(comparison, keys)]
    if found := verdict_rows(comparison):
        parts += ["", "## Verdict", "", _md_row(VERDICT_HEAD), "|---" * len(VERDICT_HEAD) + "|"]
        parts += [*map(_md_row, found), "", _md(verdict.RULE)]
    parts += ["", "MB is 10⁶ bytes; × is the ratio to the reference; – was not measured.", "", "## Answers"]
    for cell in comparison.cells:
        parts += ["", f"### {_md(cell.label)} ({state_of(cell)})", ""]
        if cell.error:
            parts += [f"**{_md(cell.error.problem)}** {_md(cell.error.advice)}", ""]
        if cell.text:
            parts += [_fenced(cell.text), ""]
        if cell.kernel:
            parts.append(
                f"- multiplied by {_md(cell.kernel)}, decode path {_md(cell.decode_path or words.NONE)}"
            )
        parts += [f"- {_md(note)}" for note in cell.notes]
        parts += [f"- {_md(line)}" for line in figures.stored_as(cell)]
    return "\n".join(parts).rstrip() + "\n"


def _md_row(values: Iterable[str]) -> str:
    return f"| {' | '.join(map(_md, values))} |"


def _md_figures(comparison: Comparison, keys: tuple[str, ...]) -> list[str]:
    shown = figures.present(comparison, keys)
    titles = [_md(f"{f.title} ({f.unit})" if f.unit else f.title) for f in shown]
    lines = ["| column | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(shown)]
    for cell in comparison.cells:
        values = [f"{f.written(cell)} {figures.beside(comparison, cell, f)}".strip() for f in shown]
        lines.append(f"| {_md(column_name(comparison, cell))} | " + " | ".join(values) + " |")
    return lines


def column_name(comparison: Comparison, cell: CellResult) -> str:
    mark = " (reference)" if figures.is_reference(comparison.reference, cell) else ""
    return f"{cell.label}{mark}" if cell.status == "ok" else f"{cell.label}{mark} ({cell.status})"


def _md(text: str) -> str:
    """Inline text: nothing in it is Markdown or HTML, and it stays on one line of a table."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", flat)


def _fenced(text: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
