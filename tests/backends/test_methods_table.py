"""docs/methods.md against the backends: every method is in its table, and the table says what the backends do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from comparator.backends import backend_for, methods, resolve
from comparator.backends.base import AdapterKind
from comparator.core.errors import UserError
from comparator.runtimes import runtime_for

TABLE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"


def rows() -> dict[str, dict[str, str]]:
    """Notation of a row → its cells by heading."""
    lines = [
        line.strip("| ") for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")
    ]
    head, *cells = ([cell.strip() for cell in line.split(" | ")] for line in lines)
    return {re.match(r"`([^`]*)`", row[0])[1]: dict(zip(head, row, strict=True)) for row in cells}


def test_every_method_is_in_the_table():
    assert {notation.partition(":")[0] for notation in rows()} == set(methods())


def merges(backend, variant) -> bool:
    try:
        backend.check_adapter(variant, AdapterKind("user/lora", "LoRA", "LORA", merged=True))
    except UserError:
        return False
    return True


@pytest.mark.parametrize("notation", rows())
def test_a_row_says_what_its_backend_does(notation: str):
    row, (backend, method) = rows()[notation], methods()[notation.partition(":")[0]]
    source = "name" if backend.source_kind == "endpoint" else "user/repo"
    variant = resolve(f"{notation}@{source}" if method.needs_source else notation)
    assert row["made here"] == ("no" if method.needs_source else "yes")
    assert row["ready-made"] == ("yes" if method.takes_source else "–")
    none = "adapters" in runtime_for(variant).absent
    takes = (
        "no" if none else "yes, merged too" if merges(backend_for(variant), variant) else "yes, not merged"
    )
    assert row["LoRA"] == takes
    speeds = (backend.decode_speed(variant, cuda) for cuda in (False, True))
    assert row["decode: CPU / GPU"] == " / ".join(speed or "–" for speed in speeds)
    if not method.needs_source:
        try:
            backend.training(variant, "cuda")
            trains = "yes"
        except UserError:
            trains = "no"
        assert row["trains"] == trains
    if not method.needs_source and not method.takes_source:
        assert row["calibration"] == ("yes" if backend.calibration_option else "no")
