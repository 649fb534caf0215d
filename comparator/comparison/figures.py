"""The runs of a column → its figures."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from comparator.core.result import CellResult, Energy
from comparator.metrics import interference, latency
from comparator.metrics.definitions import over_repeats

if TYPE_CHECKING:
    from comparator.core.messages import Generation
    from comparator.engine.column import Column


def measured(column: Column) -> CellResult:
    """The column's result, with the medians of its runs; runs that were stopped count only where there are no others."""
    runs, first = column.runs, column.runs[0]
    whole = [r for r in runs if r.finish_reason != "stopped"] or runs[:1]
    figures = latency.aggregate([r.latency for r in whole])
    undisturbed = [r for r in whole if not r.latency.disturbed] or whole
    memory = replace(
        column.result.memory,
        run_peak_bytes=over_repeats("run_peak_bytes", [r.run_peak_bytes for r in runs]),
        kv_cache_bytes=over_repeats("kv_cache_bytes", [r.kv_cache_bytes for r in runs]),
    )
    notes = [*column.loaded.notes, *(n for n in first.notes if n not in column.loaded.notes)]
    if any(r.token_ids != first.token_ids for r in whole):
        notes.append("The repeats gave different tokens: this kernel is not deterministic.")
    if disturbed := interference.note(figures.runs):
        notes.append(disturbed)
    return replace(
        column.result,
        text=first.text,
        token_ids=first.token_ids,
        finish_reason=first.finish_reason,
        thinking=first.thinking,
        decode_path=first.decode_path,
        energy=_energy(undisturbed),
        notes=tuple(notes),
        latency=replace(
            figures,
            load_s=column.load_s,
            prepare_s=column.prepare_s,
            adapter_load_s=column.adapter_load_s,
            adapter_switch_s=over_repeats("adapter_switch_s", [r.adapter_switch_s for r in whole]),
        ),
        memory=memory,
    )


def _energy(runs: list[Generation]) -> Energy | None:
    joules = over_repeats("joules_per_token", [r.joules_per_token for r in runs])
    return None if joules is None else Energy(joules)
