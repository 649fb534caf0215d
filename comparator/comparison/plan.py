"""How far a comparison is: one plan from the start that only moves forward, with the time that is left.

Made from the request before anything runs, so it is the estimate before Run too; then fed with the events. Durations are
what this run has measured so far, else what `pace` remembers of earlier runs on this machine.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from comparator.comparison.pace import Pace
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
from comparator.core.request import AUTOMATIC_ROUNDS, SHORT_ROUND_S, Request
from comparator.core.variant import Cell

LOAD, TOKEN, SCORE = "load", "token", "score"  # seconds per load, per new token, per scored token
_LEAST_LEFT = 0.05  # of a step that takes longer than expected, at least so much is still to come


@dataclass(frozen=True)
class Stage:
    """A part of the plan: `done` of `of` columns, or of runs. `of` None: not known yet whether it is needed."""

    name: str
    done: int
    of: int | None
    current: bool


@dataclass
class _Steps:
    """Of one column: what it has done, and what it does since when."""

    cell: Cell
    kind: str = ""  # LOAD, TOKEN or SCORE while it works
    began_s: float = 0.0
    part_s: float = 0.0  # when the part that `fraction` counts began: loading weights, comparing weights …
    message: str = ""
    fraction: float | None = None
    loaded: bool = False
    tokens: int = 0
    runs: int = 0
    scored: bool = False
    failed: bool = False
    took: dict[str, float] = field(default_factory=dict)  # seconds by kind, of the first time

    def begin(self, kind: str, now_s: float) -> None:
        if self.kind != kind:
            self.kind, self.began_s, self.fraction, self.message = kind, now_s, None, ""

    def part(self, event: Loading | Scoring, now_s: float) -> None:
        if event.message != self.message:
            self.message, self.part_s = event.message, now_s
        self.fraction = event.fraction

    def end(self, kind: str, now_s: float, units: int = 1) -> None:
        if self.kind == kind:
            self.took.setdefault(kind, (now_s - self.began_s) / max(units, 1))
            self.kind = ""


class Plan:
    """`apply` each event of a run of `request`, in order; read `fraction`, `left_s` and `stages` at any time.

    pace: durations of earlier runs. repeats: runs per column where the request leaves it open; 0: automatic.
    """

    def __init__(self, request: Request, pace: Pace | None = None, repeats: int = 0):
        self.request, self.pace = request, pace or Pace()
        self._rounds = request.settings.repeats or repeats  # 0: not known before the first round has ended
        self._scores = request.fidelity != "none" and (request.fidelity == "text" or len(request.cells) > 1)
        self._columns = {cell: _Steps(cell) for cell in request.cells}
        self._prompts = len(request.prompts.prompts) if request.prompts else 0
        self._answering: Answering | None = None  # the prompt of the set
        self._scoring = self._over = False
        self._began_s: float | None = None
        self._now_s = 0.0
        self._fraction = 0.0

    def apply(self, event: Event, now_s: float) -> None:
        """Take in one event, which came at `now_s` (`time.monotonic()`)."""
        self._now_s = now_s
        if isinstance(event, Done):
            self._over = True
            return
        if isinstance(event, Queued):
            return
        if self._began_s is None:
            self._began_s = now_s
        if isinstance(event, Answering):
            self._answering, self._prompts = event, event.total
            return
        column = self._columns.get(event.cell)
        if column is not None:
            self._step(column, event, now_s)

    def _step(self, column: _Steps, event: Event, now_s: float) -> None:
        if isinstance(event, Loading):
            if not column.loaded:
                column.begin(LOAD, now_s)
                column.part(event, now_s)
        elif isinstance(event, Generating):
            column.end(LOAD, now_s)
            column.loaded, self._rounds = True, max(self._rounds, event.rounds)
            column.begin(TOKEN, now_s)
            if event.round == 0:
                column.tokens += len(event.chunk.token_ids)
        elif isinstance(event, Generated):
            column.end(TOKEN, now_s, column.tokens)
            column.runs += 1
        elif isinstance(event, Scoring):
            self._scoring = True
            column.begin(SCORE, now_s)
            column.part(event, now_s)
        elif isinstance(event, Finished):
            column.end(SCORE, now_s, self._answer_tokens)
            column.scored = True
        elif isinstance(event, Failed):
            column.kind, column.failed = "", True

    def tick(self, now_s: float) -> None:
        """Time has passed without an event."""
        self._now_s = max(self._now_s, now_s)

    # ------------------------------------------------------------ what is shown

    @property
    def fraction(self) -> float:
        """Share of the whole run that is over, 0 to 1; never less than before."""
        if self._over:
            self._fraction = 1.0
        elif self._began_s is not None:
            left = self.left_s
            elapsed = self._now_s - self._began_s
            now = self._share_of_steps() if left is None else elapsed / (elapsed + left) if left else 0.0
            self._fraction = max(self._fraction, min(now, 0.99))
        return self._fraction

    @property
    def left_s(self) -> float | None:
        """Seconds until the last figure is there; None where nothing is known of one of the steps."""
        if self._over:
            return 0.0
        alive = [c for c in self._columns.values() if not c.failed]
        parts = [self._load_left(c) for c in alive] + [self._runs_left(c) for c in alive]
        if self._scores:
            parts += [self._score_left(c) for c in alive]
        if self._prompts or self.request.task:  # how many documents a task has is known once it is loaded
            parts.append(self._set_left(alive) if self._prompts else None)
        known = [p for p in parts if p is not None]
        return sum(known) if len(known) == len(parts) else None

    @property
    def stages(self) -> list[Stage]:
        """Answers, repeats and scores, as far as the request asks for them."""
        columns = [c for c in self._columns.values() if not c.failed] or list(self._columns.values())
        answered = sum(c.runs > 0 for c in columns)
        repeated = min((c.runs for c in columns), default=0)
        rounds = None if not self._rounds and answered < len(columns) else max(self._rounds, 1)
        first = answered < len(columns) and not self._scoring
        listed = [Stage("Answers", answered, len(columns), first and not self._over)]
        if rounds is None and not self._scoring:
            listed.append(Stage("Repeats", 0, None, False))
        elif (rounds or 1) > 1:
            current = not first and not self._scoring and not self._over
            listed.append(Stage("Repeats", min(repeated, rounds or 1), rounds, current))
        if self._scores:
            scored = sum(c.scored for c in columns)
            listed.append(
                Stage(
                    "Scores", scored, len(columns), self._scoring and not self._answering and not self._over
                )
            )
        if self._prompts:
            done = self._prompts if self._over else self._answering.number - 1 if self._answering else 0
            listed.append(
                Stage(
                    "Documents" if self.request.task else "Prompts",
                    done,
                    self._prompts,
                    self._answering is not None and not self._over,
                )
            )
        return listed

    def step_left_s(self, cell: Cell) -> float | None:
        """Seconds until the part of a step that the column's message names is over, as fast as it went so far; None while
        unknown."""
        column = self._columns.get(cell)
        if column is None or not column.kind or not column.fraction or column.fraction < _LEAST_LEFT:
            return None
        elapsed = self._now_s - column.part_s
        return elapsed * (1 - column.fraction) / column.fraction

    def measured(self) -> dict[str, dict[str, float]]:
        """Seconds by variant and kind, for `Pace.remember`."""
        return {c.cell.label: dict(c.took) for c in self._columns.values() if c.took}

    # ------------------------------------------------------------ how long steps take

    def _load_left(self, column: _Steps) -> float | None:
        if column.loaded:
            return 0.0
        return self._rest(column, LOAD, self._cost(column, LOAD))

    def _runs_left(self, column: _Steps) -> float | None:
        per_token = self._cost(column, TOKEN)
        if per_token is None:
            return None
        of = column.tokens if column.runs else self.request.settings.max_new_tokens
        once = per_token * of
        rounds = self._rounds or self._expected_rounds()
        ahead = max(rounds - column.runs, 0) if not self._scoring else 0
        if column.kind == TOKEN and ahead:
            return (ahead - 1) * once + self._rest(column, TOKEN, once)
        return ahead * once

    def _score_left(self, column: _Steps) -> float | None:
        if column.scored:
            return 0.0
        per_token = self._cost(column, SCORE) or self._cost(column, TOKEN)  # it is decoded token by token
        if per_token is None:
            return None
        return self._rest(column, SCORE, per_token * self._answer_tokens)

    def _set_left(self, columns: list[_Steps]) -> float | None:
        """Seconds for the prompts of the set: each is answered by each column, and scored as long as it was answered."""
        if self._answering is not None and self._answering.left_s is not None:
            return self._answering.left_s
        costs = [self._cost(c, TOKEN) for c in columns]
        if any(cost is None for cost in costs):
            return None
        rest = self._prompts - (self._answering.number - 1 if self._answering else 0)
        passes = 2 if self._scores else 1
        return rest * passes * self.request.settings.max_new_tokens * sum(cost or 0.0 for cost in costs)

    def _rest(self, column: _Steps, kind: str, expected_s: float | None) -> float | None:
        """What is left of a step that takes `expected_s` in all."""
        if column.kind != kind:
            return expected_s
        elapsed = self._now_s - column.began_s
        return None if expected_s is None else max(expected_s - elapsed, _LEAST_LEFT * expected_s)

    def _cost(self, column: _Steps, kind: str) -> float | None:
        """Seconds per unit of a kind: of this column now, else remembered, else the mean of the others."""
        if kind in column.took:
            return column.took[kind]
        if kind == TOKEN and column.kind == TOKEN and column.tokens > 1:
            return (self._now_s - column.began_s) / column.tokens
        kinds = f"{kind}:{self.request.fidelity}" if kind == SCORE else kind
        model = self.request.model
        if (remembered := self.pace.recall(model, column.cell.label, kinds)) is not None:
            return remembered
        here = [c.took[kind] for c in self._columns.values() if kind in c.took]
        known = here or self.pace.of_model(model, kinds)
        return sum(known) / len(known) if known else None

    @property
    def _answer_tokens(self) -> int:
        """Tokens of the reference's answer, as far as they are known."""
        answered = [c.tokens for c in self._columns.values() if c.runs and c.tokens]
        return answered[0] if answered else self.request.settings.max_new_tokens

    def _expected_rounds(self) -> int:
        costs = [self._cost(c, TOKEN) for c in self._columns.values() if not c.failed]
        seconds = sum(c or 0.0 for c in costs) * self._answer_tokens
        return AUTOMATIC_ROUNDS if seconds < SHORT_ROUND_S else 1

    def _share_of_steps(self) -> float:
        """Share of the steps that are over, where nothing is known of their durations."""
        steps = [
            step for c in self._columns.values() if not c.failed
            for step in (c.loaded, c.runs > 0, *([c.scored] if self._scores else []))
        ]  # fmt: skip
        return sum(steps) / len(steps) if steps else 0.0
