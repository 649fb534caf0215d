"""CSV and JSON tables: one row per column, one row per tensor. Cells that a spreadsheet would run as a formula are quoted."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from comparator.comparison.standings import standings
from comparator.core.result import CellResult, Comparison, LayerRow
from comparator.metrics.definitions import METRICS
from comparator.reporting import prompt_set, ratios
from comparator.reporting.summary import matching, shape_text

_FORMULA = re.compile(r"^\s*[=+\-@\t\r＝＋－＠]")
# A spreadsheet that splits at semicolons begins a cell at each, and a row at each line end.
_INNER_FORMULA = re.compile(r"""([;\t\r\n])(?=["' ]*[=+\-@＝＋－＠])""")


def _cell(value: Any) -> Any:
    """None is empty; numbers stay numbers; what a spreadsheet would run as a formula gets an apostrophe in front."""
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return value
    text = str(value).replace("\0", "�")
    start = _FORMULA.match(text)
    end = start.end() if start else 0
    return ("'" if start else "") + text[:end] + _INNER_FORMULA.sub(r"\1'", text[end:])


def table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """Rows as CSV, safe to open in a spreadsheet."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


VOTES = (
    "votes",
    "votes_won",
    "votes_lost",
    "votes_tied",
    "votes_both_bad",
    "win_rate",
    "win_rate_low",
    "win_rate_high",
)


def to_csv(comparison: Comparison) -> str:
    """One row per column: every metric in its base unit, followed by its ratio to the reference."""
    names = ["variant", "adapter", "reference", "status", "problem", "advice", "model", "revision", "kernel",
             "decode_path", "prompt_tokens", "new_tokens", "finish_reason"]  # fmt: skip
    for metric in METRICS.values():
        names += [metric.key] + ([f"{metric.key}_ratio"] if metric.ratio else [])
        names += [f"{metric.key}_at_least"] if metric.at_least else []
    names += [*VOTES, "notes", "text", "device", "host", "created_at", "id"]
    rates = {
        s.label: [s.votes, s.won, s.lost, s.tied, s.bad, s.rate, s.low, s.high] for s in standings(comparison)
    }
    rows = (_row(comparison, cell, rates.get(cell.label, [None] * len(VOTES))) for cell in comparison.cells)
    return table(names, rows)


def _row(comparison: Comparison, cell: CellResult, votes: list[Any]) -> list[Any]:
    model, error, environment = cell.model, cell.error, cell.environment or comparison.environment
    row: list[Any] = [
        cell.variant,
        cell.adapter,
        "yes" if ratios.is_reference(comparison.reference, cell) else "no",
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
    for metric in METRICS.values():
        row.append(metric.get(cell))
        if metric.ratio:
            row.append(ratios.ratio(comparison, cell, metric))
        if metric.at_least:
            row.append("yes" if metric.at_least(cell) else None)
    return [*row, *votes, " | ".join(cell.notes) or None, cell.text or None, environment.device, environment.host,
            comparison.created_at, comparison.id]  # fmt: skip


def to_prompts_csv(comparison: Comparison) -> str:
    """One row per prompt and column of a prompt set, where it matters first; the heading alone without one."""
    fields = ("passed", "failed_why", "kl", "at_least", "agreement", "first_difference", "compared", "tokens",
              "finish_reason", "score", "error", "text")  # fmt: skip
    return table(
        ["id", "kind", "variant", "adapter", "flip", *fields, "check", "expected", "system", "turns", "prompt"],
        (
            [row.prompt.id, row.prompt.kind, cell.variant, cell.adapter, flip or None,
             *(getattr(answer, f) for f in fields), row.prompt.check, " | ".join(row.prompt.expected), row.prompt.system,
             1 + sum(m.role == "user" for m in row.prompt.history), row.prompt.text]
            for row in prompt_set.rows(comparison)
            for cell, answer, flip in zip(comparison.cells, row.answers, row.flips, strict=True)
            if answer is not None
        ),
    )  # fmt: skip


LAYER_FIELDS = ("name", "module_class", "param_class", "logical_dtype", "storage_dtype", "compute_dtype", "shape",
                "storage_shape", "parameters", "bytes", "quant_state_bytes", "bits_per_weight", "device", "tied_to",
                "adapter_rank")  # fmt: skip


def to_layers_csv(comparison: Comparison, search: str = "") -> str:
    """One row per stored tensor of every column: as it runs and, where the first use changed it, as it was loaded.

    search: words that a row must contain in its name, class, dtype or device.
    """
    header = ["variant", "adapter", *LAYER_FIELDS, "loaded_storage_dtype", "loaded_storage_shape", "loaded_bytes",
              "loaded_quant_state_bytes"]  # fmt: skip
    rows = (
        [cell.variant, cell.adapter, *(shape_text(getattr(row, f)) for f in LAYER_FIELDS), *_loaded(row)]
        for cell in comparison.cells
        for row in matching(cell.layers, search)
    )
    return table(header, rows)


def to_layers_json(comparison: Comparison, search: str = "") -> str:
    """The same rows as a JSON list of objects, with every field."""
    rows = [
        {"variant": cell.variant, "adapter": cell.adapter, **asdict(row)}
        for cell in comparison.cells
        for row in matching(cell.layers, search)
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _loaded(row: LayerRow) -> list[Any]:
    loaded = row.loaded
    if loaded is None:
        return [None] * 4
    return [loaded.storage_dtype, shape_text(loaded.storage_shape), loaded.bytes, loaded.quant_state_bytes]
