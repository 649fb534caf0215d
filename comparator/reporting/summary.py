"""What reports, the page and the command line say about a comparison: headline, column states, verdict rows, layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from comparator.core import devices
from comparator.core.request import written_variables
from comparator.core.result import CellResult, Comparison, LayerRow, PromptInfo
from comparator.fidelity import verdict
from comparator.metrics.definitions import Place
from comparator.reporting import ratios
from comparator.util import formatting

# The sections of a report with a table of metrics, and the places of `Metric.shown` that each takes its metrics from.
SECTIONS: dict[str, tuple[Place, ...]] = {
    "Comparison": ("key",),
    "Latency": ("latency",),
    "Memory": ("memory", "loaded"),
}
_STATUS = {"ok": "done", "failed": "failed", "stopped": "stopped"}
_FINISH = {"eos": "the model ended it", "length": "limit of new tokens reached", "stopped": "stopped"}


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
        *([("Warning", unlike)] if unlike else []),
        ("Model", comparison.model),
        ("Measured", comparison.created_at),
        ("Device", _device(comparison)),
        ("Processor", environment.cpu or formatting.NONE),
        ("Driver", environment.driver or formatting.NONE),
        ("Prompt", f"{formatting.count(count)} tokens, {template_words(comparison.prompt)}"),
        ("Settings", f"{settings.max_new_tokens} new tokens at most, {sampling}, seed {settings.seed}, "
         f"{formatting.plural(settings.repeats, 'run')}, decode {settings.decode}"),
        ("Packages", ", ".join(f"{n} {v}" for n, v in sorted(environment.packages.items())) or formatting.NONE),
        ("Python", environment.python or formatting.NONE),
    ]  # fmt: skip


def template_words(prompt: PromptInfo) -> str:
    """How the prompt was made: raw text, chat template, chat template “tool_use”, enable_thinking=false."""
    if not prompt.chat:
        return "raw text"
    name = f" “{prompt.template}”" if prompt.template else ""
    return ", ".join([f"chat template{name}", *written_variables(prompt.template_vars)])


def _device(comparison: Comparison) -> str:
    """Where the columns ran, each place once."""
    environments = [c.environment or comparison.environment for c in comparison.cells] or [
        comparison.environment
    ]
    return ", ".join(dict.fromkeys(devices.place(e) for e in environments if e.device)) or formatting.NONE


def state_of(cell: CellResult) -> str:
    """How a column ended, in words."""
    ended = _FINISH.get(cell.finish_reason or "", "")
    return f"{_STATUS[cell.status]}, {formatting.plural(len(cell.token_ids), 'token')}, {ended}" if ended else _STATUS[
        cell.status
    ]  # fmt: skip


VERDICT_HEAD = (
    "variant",
    "size",
    "speed",
    "KL divergence",
    "noise floor",
    "perplexity",
    "top-1 agreement",
    "verdict",
)


def verdict_rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """One row per column under `VERDICT_HEAD`; none where no fidelity was measured."""
    verdicts = verdict.verdicts(comparison)
    if not any(v.agreement for v in verdicts):
        return []
    return [
        (
            v.cell.label,
            formatting.amount(v.size_ratio) or formatting.NONE,
            _speed(v),
            _estimate(v.kl, 1, ".2g"),
            _estimate(v.floor, 1, ".2g"),
            _estimate(v.ppl, 1, ".4g"),
            _estimate(v.agreement, 100, ".1f", " %"),
            v.words,
        )
        for v in verdicts
    ]


def _speed(one: verdict.Verdict) -> str:
    """ "1.45× as fast"; "(×1.45)" where the runs do not carry it."""
    if one.speed_ratio is None:
        return formatting.NONE
    mark = devices.MARK if one.across else ""
    return (
        formatting.pace(one.speed_ratio) + mark
        if one.speed_carried
        else f"({formatting.times(one.speed_ratio, mark)})"
    )


def _estimate(estimate: verdict.Estimate | None, scale: float, form: str, unit: str = "") -> str:
    if estimate is None:
        return formatting.NONE
    error = "" if estimate.se is None else f" ± {estimate.se * scale:.2g}"
    bound = "≥ " if estimate.at_least else ""
    return f"{bound}{estimate.mean * scale:{form}}{error}{unit}"


def column_name(comparison: Comparison, cell: CellResult) -> str:
    mark = " (reference)" if ratios.is_reference(comparison.reference, cell) else ""
    return f"{cell.label}{mark}" if cell.status == "ok" else f"{cell.label}{mark} ({cell.status})"


def shape_text(value: Any) -> Any:
    return "x".join(map(str, value)) if isinstance(value, tuple) else value


def matching(rows: Iterable[LayerRow], search: str) -> list[LayerRow]:
    """The rows that contain every word of `search` in their name, class, dtype or device, whatever the case."""
    words = search.lower().split()
    return [
        row
        for row in rows
        if all(
            word
            in f"{row.name} {row.module_class} {row.param_class} {row.storage_dtype} {row.logical_dtype} "
            f"{row.compute_dtype} {row.device}".lower()
            for word in words
        )
    ]


def stored_as(result: CellResult) -> list[str]:
    """How the tensors are stored, a line per kind: "210 × nf4 in uint8 (Linear4bit): 53.1 MB, 4.25 bits per weight"."""
    groups: dict[tuple[str, str, str], list[LayerRow]] = {}
    for row in result.layers:
        if row.tied_to is None:
            groups.setdefault((row.logical_dtype, row.storage_dtype, row.module_class), []).append(row)
    lines = []
    for (logical, storage, module), rows in sorted(groups.items(), key=lambda g: -sum(r.bytes for r in g[1])):
        total = sum(r.bytes + r.quant_state_bytes for r in rows)
        bits = formatting.ratio(8 * total, sum(r.parameters for r in rows))
        kind = logical if logical == storage else f"{logical} in {storage}"
        lines.append(
            f"{len(rows)} × {kind} ({module}): {formatting.megabytes(total)}, {formatting.figure(bits)} bits per weight"
        )
    return lines
