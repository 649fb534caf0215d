"""One column of a comparison while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field

from comparator.core.messages import Generation, Loaded
from comparator.core.result import CellResult
from comparator.core.variant import Cell


@dataclass
class Column:
    """What has been measured of one cell so far."""

    cell: Cell  # as requested: what events carry
    exact: Cell  # completed by `Engine.complete`
    result: CellResult
    loaded: Loaded | None = None
    runs: list[Generation] = field(default_factory=list)
    load_s: float | None = None
    prepare_s: float | None = None
    adapter_load_s: float | None = None
    finished: bool = False

    @property
    def alive(self) -> bool:
        return self.result.status == "ok"
