"""A column's metrics beside the reference's: which column that is, the ratio, and whether the runs carry it."""

from __future__ import annotations

from comparator.core import devices
from comparator.core.result import CellResult, Comparison
from comparator.core.variant import CellName
from comparator.fidelity import verdict
from comparator.metrics.definitions import Metric
from comparator.util import formatting


def reference_of(comparison: Comparison, cell: CellResult) -> CellResult | None:
    """The column that `cell` is compared with: the reference variant with the same adapter, else the reference.

    None for the reference itself, and where there is none.
    """
    reference = verdict.reference_of(comparison, cell)
    if reference is not cell:
        return reference
    if is_reference(comparison.reference, cell):
        return None
    return comparison.cell(comparison.reference.variant, comparison.reference.adapter)


def is_reference(name: CellName | None, cell: CellResult) -> bool:
    """Whether `cell` is the column that a comparison names as its reference."""
    return name is not None and (cell.variant, cell.adapter) == (name.variant, name.adapter)


def ratio(comparison: Comparison, cell: CellResult, metric: Metric) -> float | None:
    """The column's value over the reference's; None where either is missing or a ratio means nothing."""
    reference = reference_of(comparison, cell)
    return formatting.ratio(metric.get(cell), metric.get(reference)) if metric.ratio and reference else None


def carried(comparison: Comparison, cell: CellResult, metric: Metric) -> bool | None:
    """Whether both columns' repeated runs carry a difference in the metric; None where runs do not keep it."""
    return verdict.carried(cell, reference_of(comparison, cell), metric.key)


def beside(comparison: Comparison, cell: CellResult, metric: Metric) -> str:
    """What is written beside a value: "×0.48", "(×0.98)" where the runs do not carry the difference, or nothing."""
    mark = devices.mark(cell, reference_of(comparison, cell))
    share = formatting.times(ratio(comparison, cell, metric), mark)
    return f"({share})" if share and carried(comparison, cell, metric) is False else share
