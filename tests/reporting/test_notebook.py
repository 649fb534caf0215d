"""A comparison in a notebook: still an iterator of events, and a summary once it has ended."""

from __future__ import annotations

from dataclasses import replace

import pytest
import sample

from comparator.core.events import Done, Queued
from comparator.reporting.notebook import Running


def test_it_shows_the_summary_of_what_it_ran():
    comparison = sample.comparison()
    running = Running(iter([Queued(0), Done(comparison)]))
    assert isinstance(next(running), Queued)
    shown = running._repr_html_()
    assert "which-answer" in shown and "<svg" in shown and all(c.label in shown for c in comparison.cells)
    assert running.comparison is comparison and list(running) == []
    assert len(running.plot().data) > 0
    pandas = pytest.importorskip("pandas")
    table = running.to_pandas()
    assert isinstance(table, pandas.DataFrame) and len(table) == len(comparison.cells)


def test_a_notation_from_elsewhere_is_text():
    comparison = sample.comparison()
    evil = replace(comparison.cells[1], variant="<img src=x>")
    shown = Running(iter([Done(replace(comparison, cells=(comparison.cells[0], evil)))]))._repr_html_()
    assert "<img" not in shown


def test_closed_early_there_is_no_comparison():
    events = (event for event in [Queued(0), Done(sample.comparison())])
    running = Running(events)
    next(running)
    running.close()
    with pytest.raises(RuntimeError):
        _ = running.comparison
