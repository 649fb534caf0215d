"""Events → what each column shows right now. Plain data: knows nothing of gradio or HTML."""

from __future__ import annotations

from dataclasses import dataclass, field

from comparator.backends import most_precise
from comparator.plots import colours
from comparator.types import (
    Cell,
    CellName,
    CellResult,
    Comparison,
    Done,
    Event,
    Failed,
    Finished,
    Generated,
    Generating,
    Loading,
    Queued,
    Scoring,
)

WORKING = ("queued", "loading", "generating", "scoring")


@dataclass
class Column:
    """One column on the page. `state` is one of WORKING, or done, stopped, failed."""

    label: str
    variant: str
    adapter: str | None = None
    state: str = "queued"
    message: str = ""
    fraction: float | None = None
    text: str = ""
    tokens: int = 0
    times_s: list[float] = field(default_factory=list)  # first and last token of the round that streams
    result: CellResult | None = None
    answered: bool = False  # the text is whole; other rounds and scoring may follow
    settled: bool = False  # nothing follows

    @property
    def speed_so_far(self) -> float | None:
        """Tokens a second between the first and the latest token of the answer that is streaming."""
        if self.tokens < 2 or len(self.times_s) < 2 or self.times_s[-1] <= self.times_s[0]:
            return None
        return (self.tokens - 1) / (self.times_s[-1] - self.times_s[0])

    @property
    def finished(self) -> bool:
        return self.state not in WORKING


class Live:
    """A comparison on the page: under way (fed by `apply`), or over and done with (`Live.of`)."""

    def __init__(self, cells: tuple[Cell, ...] = (), reference: Cell | None = None, model: str = ""):
        self.model = model
        self.columns = [
            Column(c.label, c.variant.notation, c.adapter.notation if c.adapter else None) for c in cells
        ]
        self._index = {cell: number for number, cell in enumerate(cells)}
        self.ahead, self.doing = 0, ""  # how many wait before it, and what the first of them does
        self.repeats = 1
        self.recorded = False  # opened, not just measured: nothing of it is in memory here
        self.comparison: Comparison | None = None
        if reference is None and cells:
            plain = [c for c in cells if c.adapter is None] or list(cells)
            best = most_precise([c.variant for c in plain])
            reference = next(c for c in plain if c.variant == best)
        self.reference = CellName(*_names(reference)) if reference else None

    @classmethod
    def of(cls, comparison: Comparison, recorded: bool = False) -> Live:
        """A finished comparison, as it was when its last event had come."""
        live = cls(model=comparison.model)
        live.recorded = recorded
        live.apply(Done(comparison))
        return live

    @property
    def reference_column(self) -> Column | None:
        """Its result is what ratios are taken against; None while there is none."""
        name = self.reference
        return next(
            (c for c in self.columns if name and (c.variant, c.adapter) == (name.variant, name.adapter)), None
        )

    def is_reference(self, column: Column) -> bool:
        return column is self.reference_column

    def against(self, column: Column) -> Column | None:
        """What a column stands beside: the reference variant with the same adapter, else the reference; None for the
        reference itself."""
        reference = self.reference_column
        if reference is None or reference is column:
            return None
        same = (reference.variant, column.adapter)
        return next(
            (c for c in self.columns if (c.variant, c.adapter) == same and c is not column), reference
        )

    @property
    def colours(self) -> dict[str, str]:
        return colours((c.variant for c in self.columns), self.reference.variant if self.reference else None)

    @property
    def current(self) -> Column | None:
        """The column that is being worked on."""
        return next((c for c in self.columns if c.state in WORKING[1:]), None)

    def apply(self, event: Event) -> set[int]:
        """Take one event in; the numbers of the columns whose look it changed."""
        if isinstance(event, Queued):
            self.ahead, self.doing = event.ahead, event.doing
            return set()
        self.ahead = 0
        if isinstance(event, Done):
            return self._done(event.comparison)
        number = self._index.get(event.cell)
        if number is None:
            return set()
        column = self.columns[number]
        if isinstance(event, Loading | Scoring):
            if not column.settled:
                column.state = "loading" if isinstance(event, Loading) else "scoring"
                column.message, column.fraction = event.message, event.fraction
        elif isinstance(event, Generating):
            column.state, column.fraction = "generating", None
            column.message = f"run {event.round + 1} of {self.repeats}" if self.repeats > 1 else ""
            if event.round == 0:
                column.text += event.chunk.text
                column.tokens += len(event.chunk.token_ids)
                column.times_s = [*column.times_s[:1], *event.chunk.times_s[-1:]]
        elif isinstance(event, Generated | Finished | Failed):
            self._take(column, event.result)
            column.settled = not isinstance(event, Generated)
            if self._is_measure(column):
                return set(range(len(self.columns)))  # every other column's ratios change with it
        return {number}

    def _is_measure(self, column: Column) -> bool:
        return any(self.against(other) is column for other in self.columns)

    def _take(self, column: Column, result: CellResult) -> None:
        if self.reference and (column.variant, column.adapter) == (
            self.reference.variant,
            self.reference.adapter,
        ):
            self.reference = CellName(result.variant, result.adapter)  # with what the model filled in
        column.result = result
        column.variant, column.adapter, column.label = result.variant, result.adapter, result.label
        column.message, column.fraction, column.answered = "", None, True
        column.state = "done" if result.status == "ok" else result.status
        if result.text or result.status == "ok":
            column.text, column.tokens = result.text, len(result.token_ids)

    def _done(self, comparison: Comparison) -> set[int]:
        self.comparison, self.reference = comparison, comparison.reference
        self.repeats = comparison.settings.repeats
        if len(self.columns) != len(comparison.cells):
            self.columns = [Column(c.label, c.variant, c.adapter) for c in comparison.cells]
        for column, result in zip(self.columns, comparison.cells, strict=True):
            self._take(column, result)
            column.settled = True
        return set(range(len(self.columns)))


def _names(cell: Cell) -> tuple[str, str | None]:
    return cell.variant.notation, cell.adapter.notation if cell.adapter else None
