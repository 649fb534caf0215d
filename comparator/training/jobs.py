"""Training jobs of this process: start, follow, stop, come back. They run in threads of their own, tied to no page.

    trainings = get_trainings()
    job = trainings.start(TrainRequest(DataSource("pirate"), base="nf4:dq"))   # raises Problem at once
    for event in trainings.events(job): …        # from the beginning, however late one comes; ends with the job
    trainings.snapshot(job)                       # the same as one object, for a page that polls
    trainings.stop(job)                           # keeps what has been trained so far

The torch work happens on the engine's thread and under its turns, so training and comparing never share the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparator.settings import Settings
from comparator.training.types import (
    DataPreview,
    DataSource,
    Estimate,
    Evaluation,
    Target,
    TrainEvent,
    TrainingResult,
    TrainingState,
    TrainRequest,
    TrainSettings,
)


class Trainings:
    """Safe from any thread. Everything raises `Problem` for what a person can mend."""

    def __init__(self, engine: Any = None, settings: Settings | None = None):
        raise NotImplementedError

    # ------------------------------------------------------------ before

    def refusal(self) -> str | None:
        """Why nothing is trained here (a public installation, a lent GPU), or None."""
        raise NotImplementedError

    def builtin_data(self) -> list[str]:
        """Names of the data sets that come with the project."""
        raise NotImplementedError

    def preview(
        self,
        data: DataSource,
        model: str,
        settings: TrainSettings,
        system: str | None = None,
        samples: int = 5,
    ) -> DataPreview:
        """Reads the data and shows it as the model will see it. Waits for no turn; loads a tokenizer, no weights."""
        raise NotImplementedError

    def targets(self, model: str) -> tuple[Target, ...]:
        """The model's kinds of linear layer, read from the checkpoint's header."""
        raise NotImplementedError

    def estimate(self, request: TrainRequest, preview: DataPreview | None = None) -> Estimate:
        """Trainable parameters, steps and memory. `problem` is set where it cannot fit."""
        raise NotImplementedError

    # ------------------------------------------------------------ a job

    def start(self, request: TrainRequest) -> str:
        """Begin in the background; returns the job's id, which is the adapter's name."""
        raise NotImplementedError

    def resume(self, job: str) -> str:
        """Go on from the last checkpoint of a run that failed or was killed."""
        raise NotImplementedError

    def stop(self, job: str) -> None:
        """Returns at once; the job ends with `Trained(partial)` or `Cancelled`."""
        raise NotImplementedError

    def snapshot(self, job: str) -> TrainingState:
        raise NotImplementedError

    def events(self, job: str, after: int = 0) -> Iterator[TrainEvent]:
        """The job's events from number `after` on, then as they come; ends with the job. Closing it stops nothing."""
        raise NotImplementedError

    def running(self) -> TrainingState | None:
        """The job that has the device or waits for it first; what a page that comes back asks for."""
        raise NotImplementedError

    def jobs(self) -> tuple[TrainingState, ...]:
        """This process's jobs, newest first, and runs on disk that a killed process left (`interrupted`)."""
        raise NotImplementedError

    def forget(self, job: str) -> None:
        """Throw a failed or interrupted run away, checkpoints included."""
        raise NotImplementedError

    # ------------------------------------------------------------ after

    def finished(self) -> tuple[TrainingResult, ...]:
        """The adapters that were trained here, newest first; read from their folders."""
        raise NotImplementedError

    def result(self, name: str) -> TrainingResult:
        raise NotImplementedError

    def remove(self, name: str) -> None:
        """Delete a trained adapter."""
        raise NotImplementedError

    def evaluate(self, name: str, variants: list[str], cancel: Any = None) -> Iterator[Any]:
        """Loss and perplexity on the held-back samples, for each variant without and with the adapter. Yields
        `comparator.messages.Progress` (fraction, message) and `EvalRow`s as they come, last the `Evaluation`, which
        is kept in training.json too. Takes a turn of the engine."""
        raise NotImplementedError
        yield Evaluation  # pragma: no cover

    def zipped(self, name: str, folder: Path) -> Path:
        """The adapter as NAME.zip in `folder`, for a download."""
        raise NotImplementedError

    def push(self, name: str, repo: str, private: bool = True) -> str:
        """Upload to the Hub; returns the address."""
        raise NotImplementedError


def get_trainings() -> Trainings:
    """The registry of this process."""
    raise NotImplementedError
