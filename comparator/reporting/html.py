"""A comparison as one self-contained HTML page: readable offline, on paper, on a light and on a dark screen.

The template escapes every value, and a content security policy that names our scripts by their hash keeps any other
from running.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparator.core.result import CellResult, Comparison, LayerRow
from comparator.core.votes import Judge
from comparator.fidelity import verdict
from comparator.metrics.definitions import LEGEND, METRICS, Place, present
from comparator.reporting import answer, prompt_set, ratios, set_matrix, votes
from comparator.reporting import summary as reporting_summary
from comparator.util import formatting
from comparator.util.templates import environment

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

_TEMPLATES = Path(__file__).with_name("templates")
_LAYER_HEAD = ("name", "module", "means", "stored as", "multiplies in", "shape", "stored shape", "bytes", "quant state",
               "bits/weight", "device", "note")  # fmt: skip


def page(comparison: Comparison) -> str:
    """The whole page. Plots are left out where plotly is not installed; everything else stays."""
    from markupsafe import Markup

    plots, scripts = _plots(comparison)
    allowed = " ".join(f"'sha256-{_hash(script)}'" for script in scripts) or "'none'"
    return environment(_TEMPLATES).get_template("report.html").render(
        comparison=comparison,
        title=f"{comparison.model}: {', '.join(cell.label for cell in comparison.cells)}",
        policy=f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; font-src data:; script-src {allowed}",
        legend=LEGEND,
        answer=Markup(answer.render(comparison.cells, verdict.reference_cell(comparison), prompt_set.summaries(comparison))),
        headline=[fact for fact in reporting_summary.headline(comparison) if fact[1] != formatting.NONE],
        sections={name: _section(comparison, places) for name, places in reporting_summary.SECTIONS.items()},
        prompt_set=_prompt_set(comparison),
        votes=_votes(comparison),
        judges=[_judge(comparison, judge) for judge in (comparison.votes.judges if comparison.votes else ())],
        verdict_head=reporting_summary.VERDICT_HEAD,
        verdicts=reporting_summary.verdict_rows(comparison),
        rule=verdict.RULE,
        cards=[_card(comparison, cell) for cell in comparison.cells],
        plots=plots,
        layer_head=_LAYER_HEAD,
        layers=[
            (f"{cell.label}: {formatting.plural(len(cell.layers), 'stored tensor')}", map(_layer, cell.layers))
            for cell in comparison.cells
            if cell.layers
        ],
        codes=[(cell.label, _code(comparison, cell)) for cell in comparison.cells if cell.status != "failed"],
        definitions=[(metric.title, metric.description) for metric in present(comparison)],
        scripts=[Markup(script) for script in scripts],
    )  # fmt: skip


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()


def _section(comparison: Comparison, places: tuple[Place, ...]) -> dict[str, Any]:
    """The metrics of a section and, for each column, (the column, its marks, (value, ratio) of each metric)."""
    metrics = present(comparison, *places)
    rows = []
    for cell in comparison.cells:
        marks = ["reference"] if ratios.is_reference(comparison.reference, cell) else []
        marks += [cell.status] if cell.status != "ok" else []
        rows.append((cell, marks, [(m.format(cell), ratios.beside(comparison, cell, m)) for m in metrics]))
    return {"metrics": metrics, "rows": rows}


def _prompt_set(comparison: Comparison) -> dict[str, Any] | None:
    from markupsafe import Markup

    if comparison.prompt_set is None:
        return None
    return {
        "title": prompt_set.title(comparison),
        "scores": prompt_set.score_table(comparison),
        "head": prompt_set.SUMMARY_HEAD,
        "rows": prompt_set.summary_rows(comparison),
        "note": prompt_set.note(comparison),
        "matrix": Markup(set_matrix.render(comparison, prompt_set.rows(comparison))),
    }


def _votes(comparison: Comparison) -> dict[str, Any] | None:
    """Win rates of all blind votes, and by visitor where there are several."""
    if not votes.title(comparison):
        return None
    visitors = votes.visitor_rows(comparison)
    return {
        "title": votes.title(comparison),
        "head": votes.HEAD,
        "rows": votes.totals(comparison),
        "visitor_head": votes.visitor_head(comparison),
        "visitors": visitors if len(visitors) > 1 else [],
        "rule": votes.RULE,
    }


def _judge(comparison: Comparison, judge: Judge) -> dict[str, Any]:
    return {
        "title": votes.judge_title(judge),
        "head": votes.HEAD,
        "rows": votes.judge_totals(comparison, judge),
        "sentences": votes.judge_sentences(comparison, judge),
        "reasons_head": votes.REASONS_HEAD,
        "reasons": votes.reason_rows(comparison, judge),
        "instructions": judge.instructions,
        "rule": votes.JUDGE_RULE,
    }


def _card(comparison: Comparison, cell: CellResult) -> dict[str, Any]:
    from comparator.reporting.plots.style import comparison_colours

    kernel = f"multiplied by {cell.kernel}, decode path {cell.decode_path or formatting.NONE}"
    return {
        "cell": cell,
        "colour": comparison_colours(comparison)[cell.variant],
        "state": reporting_summary.state_of(cell),
        "notes": [*([kernel] if cell.kernel else []), *cell.notes, *reporting_summary.stored_as(cell)],
    }


def _layer(row: LayerRow) -> tuple[str, ...]:
    note = [f"shares its bytes with {row.tied_to}"] if row.tied_to else []
    note += [f"adapter of rank {row.adapter_rank}"] if row.adapter_rank else []
    if row.loaded:
        note.append(f"loaded as {row.loaded.storage_dtype} {_shape(row.loaded.storage_shape)}")
    return (row.name, row.module_class, row.logical_dtype, row.storage_dtype, row.compute_dtype, _shape(row.shape),
            _shape(row.storage_shape), formatting.count(row.bytes), formatting.count(row.quant_state_bytes),
            formatting.figure(row.bits_per_weight), row.device, "; ".join(note))  # fmt: skip


def _shape(shape: tuple[int, ...]) -> str:
    return " × ".join(map(str, shape)) or "scalar"


def _code(comparison: Comparison, cell: CellResult) -> str:
    """The code of a column. A document from elsewhere may name methods that do not exist here."""
    from comparator.core.errors import UserError
    from comparator.reporting.snippet import snippet

    try:
        return snippet(cell, comparison)
    except UserError as error:
        return f"# {error}"


def _drawn(comparison: Comparison) -> Iterable[tuple[Figure, str, str]]:
    """(figure, heading, caption) of every plot that applies."""
    from comparator.reporting.plots import fidelity, latency, memory

    yield (
        latency.token_timeline(comparison),
        "Tokens over time",
        "A line starts at the time to first token; its slope is the speed.",
    )
    yield (
        latency.inter_token_box(comparison),
        "Time between tokens",
        "Each box spans the middle half of the tokens; the line in it is the median.",
    )
    yield (
        memory.memory_bars(comparison),
        "Memory",
        "Memory of each variant by kind; the diamond marks the peak while it ran.",
    )
    if any(METRICS["prompt_kl_mean"].get(cell) for cell in comparison.cells):
        yield (
            fidelity.kl_by_token(comparison),
            "Divergence by token",
            "KL divergence from the reference at each token of its own answer.",
        )
        yield (
            fidelity.trade_off(comparison),
            "Memory against divergence",
            "Lower left is better; the line joins the variants that no other beats in both.",
        )
    for cell in comparison.cells:
        if any(row.error for row in cell.layers):
            yield (fidelity.layer_map(cell), f"Weight error of {cell.label}",
                   "How far each layer's weights are from the reference's: relative Frobenius error.")  # fmt: skip


def _plots(comparison: Comparison) -> tuple[list[tuple[str, str, str]] | None, list[str]]:
    """((heading, caption, figure as JSON) of every plot with data, the scripts that draw them); None without plotly."""
    from markupsafe import Markup

    try:
        from plotly.offline import get_plotlyjs
    except ModuleNotFoundError:
        return None, []
    plots = [
        (
            heading,
            caption,
            Markup(figure.to_json().replace("<", "\\u003c")),
        )  # no tag can end the script element
        for figure, heading, caption in _drawn(comparison)
        if figure.data
    ]
    return plots, [get_plotlyjs(), (_TEMPLATES / "plots.js").read_text(encoding="utf-8")] if plots else []
