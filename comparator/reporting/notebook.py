"""A comparison in a notebook: its events as they come, and once it has ended the answer, a table and a chart."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comparator.core.events import Done, Event
from comparator.core.result import Comparison
from comparator.fidelity import verdict
from comparator.metrics.definitions import present
from comparator.reporting import answer, csv_export, prompt_set, ratios
from comparator.reporting.plots import fidelity
from comparator.util.templates import environment

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

_TEMPLATES = Path(__file__).with_name("templates")


class Running(Iterator[Event]):
    """The events of a comparison. Whatever needs the result runs what is left of it first; a cell of a notebook that ends
    with this object shows the summary."""

    def __init__(self, events: Iterator[Event]):
        self._events, self._comparison = events, None

    def __next__(self) -> Event:
        event = next(self._events)
        if isinstance(event, Done):
            self._comparison = event.comparison
        return event

    def close(self) -> None:
        """Stop the work; returns once the engine is free."""
        close: Any = getattr(self._events, "close", None)
        if close:
            close()

    @property
    def comparison(self) -> Comparison:
        """The finished comparison. Raises `RuntimeError` after `close`, where there is none."""
        if self._comparison is None:
            for _ in self:
                pass
        if self._comparison is None:
            raise RuntimeError("The comparison was closed before it ended.")
        return self._comparison

    def to_pandas(self) -> DataFrame:
        """A row per column of the comparison, as in the .csv. Needs pandas."""
        import pandas

        return pandas.read_csv(io.StringIO(csv_export.to_csv(self.comparison)))

    def plot(self) -> Figure:
        """Memory against KL divergence, a plotly figure."""
        return fidelity.trade_off(self.comparison)

    def _repr_html_(self) -> str:
        return summary_html(self.comparison)


def summary_html(comparison: Comparison) -> str:
    """Which column to take, the chart and the key figures, as HTML that brings its own style."""
    from markupsafe import Markup

    metrics = present(comparison, "key")
    rows = [
        (cell.label, [f"{m.format(cell)} {ratios.beside(comparison, cell, m)}".strip() for m in metrics])
        for cell in comparison.cells
    ]
    which = answer.render(
        comparison.cells, verdict.reference_cell(comparison), prompt_set.summaries(comparison)
    )
    return environment(_TEMPLATES).get_template("notebook.html").render(
        answer=Markup(which), metrics=metrics, rows=rows
    )  # fmt: skip
