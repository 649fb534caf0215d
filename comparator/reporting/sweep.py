"""A sweep as a file."""

from __future__ import annotations

import json

from comparator.capacity import sweep_words
from comparator.capacity.sweep import Sweep
from comparator.reporting.csv_export import table

FORMATS = (".csv", ".json")


def text(sweep: Sweep, ending: str) -> str:
    """The contents of a file with this ending, one of `FORMATS`."""
    if ending == ".json":
        return json.dumps(sweep.to_dict(), indent=1, ensure_ascii=False) + "\n"
    return table(*sweep_words.csv_rows(sweep))
