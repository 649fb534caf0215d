"""Events → the current state of each column, as plain data."""

from __future__ import annotations

from dataclasses import dataclass, field

from comparator.backends import most_precise
from comparator.comparison.plan import Plan
from comparator.core.events import (
    Answering,
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
from comparator.core.request import Request
from comparator.core.result import CellResult, Comparison, Environment, PromptInfo
from comparator.core.variant import Cell, CellName
from comparator.reporting.plots.style import colours

WORKING = ("queued", "loading", "generating", "answered", "scoring")
AT_WORK = ("loading", "generating", "scoring")


@dataclass
class Column:
    """One column on the page. `state` is one of WORKING, or done, stopped or failed.

    answered: the answer is whole; repeats and scoring follow. It is never loading or done before that again.
    """

    label: str
    variant: str
    adapter: str | None = None
    state: str = "queued"
    message: str = ""
    fraction: float | None = None
    left_s: float | None = None  # until what it does now is over
    text: str = ""
    tokens: int = 0
    times_s: list[float] = field(
        default_factory=list
    )  # times of the first and latest token of the answer being streamed
    result: CellResult | None = None
    answered: bool = False  # the answer is complete; repeats and scoring may follow
    settled: bool = False  # no more events will come

    @property
    def speed_so_far(self) -> float | None:
        """Tokens per second from the first to the latest token of the answer being streamed."""
        if self.tokens < 2 or len(self.times_s) < 2 or self.times_s[-1] <= self.times_s[0]:
            return None
        return (self.tokens - 1) / (self.times_s[-1] - self.times_s[0])

    @property
    def finished(self) -> bool:
        return self.state not in WORKING


class Live:
    """A comparison on the page: running (updated by `apply`), or finished (`Live.of`)."""

    def __init__(
        self,
        cells: tuple[Cell, ...] = (),
        reference: Cell | None = None,
        model: str = "",
        plan: Plan | None = None,
    ):
        self.model, self.plan = model, plan
        self.columns = [
            Column(c.label, c.variant.notation, c.adapter.notation if c.adapter else None) for c in cells
        ]
        self._index = {cell: number for number, cell in enumerate(cells)}
        self.ahead, self.doing = (
            0,
            "",
        )  # number of jobs ahead in the queue, and what the first of them is doing
        self.scoring = False  # the last run is over, and fidelity is being measured
        self.answering: Answering | None = None  # the prompt of a set that is being answered
        self.recorded = False  # a saved comparison was opened: nothing of it is in memory here
        self.comparison: Comparison | None = None
        if reference is None and cells:
            plain = [c for c in cells if c.adapter is None] or list(cells)
            best = most_precise([c.variant for c in plain])
            reference = next(c for c in plain if c.variant == best)
        self.reference = CellName(*_names(reference)) if reference else None

    @classmethod
    def of(cls, comparison: Comparison, recorded: bool = False) -> Live:
        """The state after the last event of a finished comparison."""
        live = cls(model=comparison.model)
        live.recorded = recorded
        live.apply(Done(comparison))
        return live

    @property
    def reference_column(self) -> Column | None:
        """The column that ratios are relative to, or None."""
        name = self.reference
        return next(
            (c for c in self.columns if name and (c.variant, c.adapter) == (name.variant, name.adapter)), None
        )

    def is_reference(self, column: Column) -> bool:
        return column is self.reference_column

    def against(self, column: Column) -> Column | None:
        """The column that `column` is compared with: the reference variant with the same adapter, else the reference; None
        for the reference itself."""
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
        """The column that is being loaded, generated or scored."""
        return next((c for c in self.columns if c.state in AT_WORK), None)

    def so_far(self, request: Request) -> Comparison:
        """The columns that have answered so far as a comparison, for tables and plots; nothing in it is final."""
        return Comparison(
            id="", created_at="", model=self.model, environment=Environment(), reference=self.reference,
            prompt=PromptInfo(request.prompt, request.system), settings=request.settings,
            cells=tuple(c.result for c in self.columns if c.answered and c.result),
        )  # fmt: skip

    def apply(self, event: Event) -> set[int]:
        """Apply one event; returns the numbers of the columns it changed."""
        if isinstance(event, Queued):
            self.ahead, self.doing = event.ahead, event.doing
            return set()
        self.ahead, self.answering = 0, event if isinstance(event, Answering) else None
        if isinstance(event, Answering):
            return set()
        if isinstance(event, Done):
            return self._done(event.comparison)
        number = self._index.get(event.cell)
        if number is None:
            return set()
        column = self.columns[number]
        if isinstance(event, Loading | Scoring):
            self._working(column, event)
        elif isinstance(event, Generating):
            column.state, column.fraction, column.left_s = "generating", None, None
            column.message = f"run {event.round + 1} of {event.rounds}" if event.rounds > 1 else ""
            if event.round == 0:
                column.text += event.chunk.text
                column.tokens += len(event.chunk.token_ids)
                column.times_s = [*column.times_s[:1], *event.chunk.times_s[-1:]]
        elif isinstance(event, Generated | Finished | Failed):
            self._take(column, event.result)
            column.settled = not isinstance(event, Generated)
            if not column.settled and column.state == "done":
                column.state = "answered"
            if self._is_measure(column):
                return set(range(len(self.columns)))  # the ratios of all other columns change
        return {number}

    def _working(self, column: Column, event: Loading | Scoring) -> None:
        """A column loads or is scored. One that has answered and loads again stays answered: no step is taken back."""
        if column.settled:
            return
        if isinstance(event, Scoring):
            column.state = "scoring"
        elif not column.answered:
            column.state = "loading"
        column.message, column.fraction = event.message, event.fraction
        column.left_s = self.plan.step_left_s(event.cell) if self.plan else None

    def _is_measure(self, column: Column) -> bool:
        return any(self.against(other) is column for other in self.columns)

    def _take(self, column: Column, result: CellResult) -> None:
        if self.reference and (column.variant, column.adapter) == (
            self.reference.variant,
            self.reference.adapter,
        ):
            self.reference = CellName(
                result.variant, result.adapter
            )  # including options that depend on the model
        column.result = result
        column.variant, column.adapter, column.label = result.variant, result.adapter, result.label
        column.message, column.fraction, column.left_s, column.answered = "", None, None, True
        column.state = "done" if result.status == "ok" else result.status
        if result.text or result.status == "ok":
            column.text, column.tokens = result.text, len(result.token_ids)

    def _done(self, comparison: Comparison) -> set[int]:
        self.comparison, self.reference = comparison, comparison.reference
        if len(self.columns) != len(comparison.cells):
            self.columns = [Column(c.label, c.variant, c.adapter) for c in comparison.cells]
        for column, result in zip(self.columns, comparison.cells, strict=True):
            self._take(column, result)
            column.settled = True
        return set(range(len(self.columns)))


def _names(cell: Cell) -> tuple[str, str | None]:
    return cell.variant.notation, cell.adapter.notation if cell.adapter else None
