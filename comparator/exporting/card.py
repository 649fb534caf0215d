"""The model card of an exported variant: how to load it, and what was measured. Says nothing that was not."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from comparator.backends import backend_for
from comparator.core import VERSION
from comparator.core.errors import UserError
from comparator.core.result import CellResult, Comparison
from comparator.core.variant import Cell, Variant
from comparator.fidelity import verdict
from comparator.metrics.definitions import present
from comparator.reporting import ratios, summary
from comparator.reporting.markdown import inline
from comparator.sources import Checkpoint, builtin_names, naming
from comparator.util import formatting

if TYPE_CHECKING:
    from comparator.exporting.job import ExportRequest

_HEADLINE = ("Measured", "Device", "Processor", "Driver", "Prompt", "Settings", "Packages", "Python")


def column(comparison: Comparison, cell: Cell) -> CellResult:
    """The column of this variant in a comparison. Raises `UserError` where there is none that answered."""
    adapter = cell.adapter.notation if cell.adapter else None
    found = comparison.cell(cell.variant.notation, adapter)
    if found is None or found.status != "ok":
        labels = ", ".join(c.label for c in comparison.cells if c.status == "ok")
        raise UserError(
            f"The comparison has no measured variant {cell.label}.", f"It has {labels or 'none'}."
        )
    return found


def write(
    request: ExportRequest, variant: Variant, checkpoint: Checkpoint, license: str | None, size: int
) -> str:
    """README.md as text. variant: completed; size: bytes of the folder's files."""
    base, written = naming.public_name(checkpoint.source), shareable(variant)
    with_adapter = f" with {naming.public_name(request.adapter.source)} merged" if request.adapter else ""
    parts = [
        *_metadata(variant, base, license),
        f"# {base.rpartition('/')[2]}, {written}{with_adapter}",
        "",
        f"`{written}` of {inline(base)}{with_adapter}: {inline(backend_for(variant).describe(variant))}. "
        f"{formatting.megabytes(size)} in files, written by Quant Comparator {VERSION}.",
        "",
        *([checkpoint.note, ""] if checkpoint.note else []),
        *_loading(variant, base if checkpoint.source not in builtin_names() else checkpoint.source),
        "",
        "## What was measured",
        "",
        *(_measured(request) if request.comparison else _not_measured(variant)),
    ]
    return "\n".join(parts).rstrip() + "\n"


def shareable(variant: Variant) -> str:
    """The notation without a path of this machine."""
    if not variant.source:
        return variant.notation
    return Variant(
        variant.method, naming.public_name(variant.source), variant.revision, variant.options
    ).notation


def reading_method(variant: Variant) -> str:
    """What stands before the folder where it is loaded here: "nf4@", or nothing for a full-precision model."""
    return f"{variant.method}@" if backend_for(variant).method(variant.method).takes_source else ""


def _metadata(variant: Variant, base: str, license: str | None) -> list[str]:
    """The front matter, which the Hub reads."""
    backend = backend_for(variant)
    bits = backend.bits(variant)
    quantized = bits < 16
    tags = ["quant-comparator", variant.method]
    tags += (
        [f"{bits:g}-bit", *(name for name in (*backend.libraries, *backend.reads) if "." not in name)]
        if quantized
        else []
    )
    lines = [f"base_model: {json.dumps(base)}"] if "/" in base else []
    lines += ["base_model_relation: quantized"] if lines and quantized else []
    lines += [f"license: {license}"] if license else []
    if "transformers" in backend.loaded_by:
        lines.append("library_name: transformers")
    return [
        "---",
        *lines,
        "pipeline_tag: text-generation",
        f"tags: {json.dumps(list(dict.fromkeys(tags)))}",
        "---",
        "",
    ]


def _loading(variant: Variant, base: str) -> list[str]:
    backend = backend_for(variant)
    here = f"{reading_method(variant)}FOLDER"
    run = (
        f"python -m comparator run -m {base} -v bf16 -v {here} -p “…”"
        if "@" in here
        else f"python -m comparator run -m {here} -p “…”"
    )
    lines = ["## Load it", ""]
    if "transformers" in backend.loaded_by:
        packages = " ".join(name for name in (*backend.requires, *backend.making) if name != "torch")
        lines += [
            "```python", f"# pip install torch {packages}", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            'model = AutoModelForCausalLM.from_pretrained("FOLDER", device_map="auto")',
            'tokenizer = AutoTokenizer.from_pretrained("FOLDER")', "```", "",
        ]  # fmt: skip
    others = [name for name in backend.loaded_by if name != "transformers"]
    if others:
        lines += [
            f"According to the documentation, {formatting.join(others)} can load this format too; this was not tested here.",
            "",
        ]
    if not backend.loaded_by:
        lines += ["No other program is known to load this layout.", ""]
    return [*lines, f"Quant Comparator: `{run}`"]


def _not_measured(variant: Variant) -> list[str]:
    return [
        f"Nothing. `python -m comparator run -v bf16 -v {shareable(variant)} -o result.json` measures it, and "
        "`export --from result.json` writes the figures here."
    ]


def _measured(request: ExportRequest) -> list[str]:
    comparison = request.comparison
    assert comparison is not None
    cell = column(comparison, request.cell)
    reference = verdict.reference_of(comparison, cell)
    beside = reference is not None and reference is not cell
    head = ["", _label(cell), *([f"{_label(reference)} (reference)"] if beside else [])]
    lines = [_row(head), "|---" + "|---:" * (len(head) - 1) + "|"]
    for metric in present(comparison, "key", "summary"):
        if metric.get(cell) is None:
            continue
        ratio = ratios.beside(comparison, cell, metric)
        values = [metric.heading, f"{metric.format(cell)} {ratio}".strip()]
        lines.append(_row([*values, *([metric.format(reference)] if beside else [])]))
    facts = [
        f"- **{name}**: {inline(value)}"
        for name, value in summary.headline(comparison)
        if name in _HEADLINE and value != formatting.NONE
    ]
    if quality := verdict.words(cell, reference) if beside else "":
        facts.insert(0, f"- **Verdict**: {inline(quality)}")
    place = f"[{comparison.id}]({request.link})" if request.link else comparison.id
    return [
        *lines, "", f"MB is 10⁶ bytes; × is the ratio to the reference. Comparison {place}.", "", *facts,
    ]  # fmt: skip


def _label(cell: CellResult) -> str:
    from comparator.core.variant import parse_variant

    return shareable(parse_variant(cell.variant)) + (
        f" + {naming.public_name(cell.adapter)}" if cell.adapter else ""
    )


def _row(values: list[str]) -> str:
    return f"| {' | '.join(map(inline, values))} |"
