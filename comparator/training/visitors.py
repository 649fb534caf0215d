"""Trainings as one visitor of a public server has them: their own jobs and adapters, within the limits for visitors.

    mine = trainings.seen_by(key)     # on a private installation everything is everybody's: it returns `trainings`

What belongs to another visitor is treated as if it did not exist. Adapters of visitors have a random ending, so that a name
tells nothing about what others have.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from comparator.adapters.locate import trained_folder, trained_names
from comparator.backends import resolve
from comparator.core.errors import UserError
from comparator.core.variant import Cell
from comparator.deploy.limits import limits_of
from comparator.engine.protocol import OnProgress, ignore
from comparator.store.owner import digest
from comparator.training import artifact, run_store, validation
from comparator.training.types import (
    DataPreview,
    DataSource,
    Estimate,
    EvalRow,
    Evaluation,
    Target,
    TrainingResult,
    TrainingState,
    TrainRequest,
)

if TYPE_CHECKING:
    from comparator.training.registry import Trainings
    from comparator.training.settings import TrainSettings


class VisitorTrainings:
    """The methods of `Trainings` that the page calls, for the visitor with this key; None: one without a key, who has
    nothing and may start nothing."""

    def __init__(self, trainings: Trainings, key: str | None):
        self._all, self._owner = trainings, digest(key)
        self._limits = limits_of(trainings.settings)
        self.settings = trainings.settings

    # ------------------------------------------------------------ before training: nobody's

    def refusal(self) -> str | None:
        return self._all.refusal()

    def installation_refusal(self) -> str | None:
        return self._all.installation_refusal()

    def preview(
        self,
        source: DataSource,
        model: str,
        settings: TrainSettings,
        system: str | None = None,
        samples: int = 5,
    ) -> DataPreview:
        return self._all.preview(source, model, settings, system, samples)

    def targets(self, model: str) -> tuple[Target, ...]:
        return self._all.targets(model)

    def estimate(self, request: TrainRequest, preview: DataPreview | None = None) -> Estimate:
        self._check(request)
        return self._all.estimate(request, preview)

    # ------------------------------------------------------------ jobs

    def start(self, request: TrainRequest, visitor: str = "") -> str:
        """`Trainings.start`, under a name with a random ending. `visitor`: whose turn it takes in the queue."""
        if self._owner is None:
            raise UserError("This browser has no key yet.", "Reload the page, with scripts turned on.")
        self._check(request)
        self._make_sure_of_room(visitor)
        stem = request.name or validation.free_name(request, set())
        named = replace(request, name=f"{stem[:48]}-{secrets.token_hex(4)}")
        return self._all.start(named, self._owner, visitor)

    def resume(self, job: str, visitor: str = "") -> str:
        self._make_sure_of_room(visitor, resumed=True)
        return self._all.resume(self._own(job), visitor)

    def stop(self, job: str) -> None:
        self._all.stop(self._own(job))

    def forget(self, job: str) -> None:
        self._all.forget(self._own(job))

    def snapshot(self, job: str) -> TrainingState:
        return self._all.snapshot(self._own(job))

    def running(self) -> TrainingState | None:
        return next((s for s in self.jobs() if not s.over), None)

    def jobs(self) -> tuple[TrainingState, ...]:
        return tuple(s for s in self._all.jobs() if self._is_own(s.job))

    # ------------------------------------------------------------ trained adapters

    def owns_adapter(self, name: str) -> bool:
        """Whether `name` is no adapter that was trained here, or one of this visitor's."""
        return name not in trained_names(self.settings) or self._is_own(name)

    def finished(self) -> tuple[TrainingResult, ...]:
        return tuple(r for r in self._all.finished() if self._is_own(r.name))

    def result(self, name: str) -> TrainingResult:
        return self._all.result(self._own(name))

    def remove(self, name: str) -> None:
        self._all.remove(self._own(name))

    def evaluate(
        self,
        name: str,
        variants: list[str],
        cancel: threading.Event | None = None,
        on_progress: OnProgress = ignore,
        on_row: Callable[[EvalRow], None] = ignore,
    ) -> Evaluation:
        for notation in variants:
            self._limits.check_cell(Cell(resolve(notation)))
        return self._all.evaluate(self._own(name), variants, cancel, on_progress, on_row)

    def zipped(self, name: str, into: Path) -> Path:
        return self._all.zipped(self._own(name), into)

    def push(self, name: str, repo: str, private: bool = True, token: str | None = None) -> str:
        return self._all.push(self._own(name), repo, private, token)

    # ------------------------------------------------------------ whose it is, and how much

    def _own(self, name: str) -> str:
        """The name again. Raises `UserError` in the words for what does not exist."""
        if not self._is_own(name):
            raise UserError(
                f"You have no training run or adapter “{name[:100]}” here.",
                "Adapters trained in another browser are listed only there.",
            )
        return name

    def _is_own(self, name: str) -> bool:
        return self._owner is not None and self._all.owner(name) == self._owner

    def _check(self, request: TrainRequest) -> None:
        limits, characters = self._limits, len(request.sample_prompt or "") + len(request.system or "")
        if request.output:
            raise UserError(
                "Adapters cannot be written to a folder of the server here.", "Omit the output folder."
            )
        limits.check_cell(Cell(resolve(request.base)))
        limits.check_characters(characters)

    def _make_sure_of_room(self, visitor: str, resumed: bool = False) -> None:
        """Raises `UserError` where the visitor or the server has as many trainings as are allowed."""
        if self.running() or self._all.running_of(visitor):
            raise UserError(
                "You already have a training run running or queued.", "Wait until it has ended, or stop it."
            )
        if resumed:
            return
        folder, work = trained_folder(self.settings), self.settings.data_dir / "trainings"
        everybodys = {*trained_names(self.settings), *run_store.names(work)}
        own = [n for n in everybodys if self._is_own(n)]
        most, most_total = self._limits.max_adapters, self._limits.max_adapters_total
        if most is not None and len(own) >= most:
            raise UserError(
                f"You have {len(own)} adapters and unfinished training runs; the limit here is {most} "
                "(COMPARATOR_MAX_ADAPTERS).",
                "Download what you want to keep, and delete one.",
            )
        visitors_ = sum(artifact.owner(folder / n) is not None for n in everybodys)
        if most_total is not None and visitors_ >= most_total:
            raise UserError(
                f"This server keeps {visitors_} adapters of visitors; the limit is {most_total} "
                "(COMPARATOR_MAX_ADAPTERS_TOTAL).",
                "Try again later, or run Quant Comparator on your own machine.",
            )
