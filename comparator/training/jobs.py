"""Training jobs of this process: start, follow, stop, come back. They run in threads of their own, tied to no page.

    trainings = get_trainings()
    job = trainings.start(TrainRequest(DataSource("pirate"), base="nf4:dq"))   # raises Problem at once
    for event in trainings.events(job): …        # from the beginning, however late one comes; ends with the job
    trainings.snapshot(job)                       # the same as one object, for a page that polls
    trainings.stop(job)                           # keeps what has been trained so far

The torch work happens on the engine's thread and under its turns, so training and comparing never share the device.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from comparator import engine as engines
from comparator import zerogpu
from comparator.adapters.find import builtin_names as builtin_adapters
from comparator.adapters.find import trained_folder, trained_names
from comparator.settings import Settings
from comparator.training import base, check, data, estimate, folder, store, targets, tokens
from comparator.training.job import Job
from comparator.training.settings import TrainSettings
from comparator.training.types import (
    DataPreview,
    DataSource,
    Estimate,
    Target,
    TrainEvent,
    TrainingResult,
    TrainingState,
    TrainRequest,
)
from comparator.types import Problem


class Trainings:
    """Safe from any thread. Everything raises `Problem` for what a person can mend."""

    def __init__(self, engine: Any = None, settings: Settings | None = None):
        self.engine = engine or engines.get_engine()
        self.settings = settings or self.engine.settings
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._tokenizers: dict[str, Any] = {}
        self._checkpoints: dict[str, Any] = {}

    @property
    def _work(self) -> Path:
        return self.settings.data_dir / "trainings"

    # ------------------------------------------------------------ before

    def refusal(self) -> str | None:
        """Why nothing is trained here (a public installation, a lent GPU), or None."""
        if self.settings.training is False:
            return "Training is switched off here (COMPARATOR_TRAINING=0)."
        if self.settings.training:
            return None
        if zerogpu.active():
            return "On ZeroGPU the GPU is lent for two minutes at most, which is too short to train."
        if self.settings.public:
            return "This is a public installation: training would take the device from everybody for minutes."
        return None

    def _allow(self) -> None:
        if why := self.refusal():
            raise Problem(
                why, "Run Quant Comparator on your own machine, or set COMPARATOR_TRAINING=1 on this one."
            )

    def builtin_data(self) -> list[str]:
        """Names of the data sets that come with the project."""
        return data.builtin_names()

    def preview(
        self,
        source: DataSource,
        model: str,
        settings: TrainSettings,
        system: str | None = None,
        samples: int = 5,
    ) -> DataPreview:
        """Reads the data and shows it as the model will see it. Waits for no turn; loads a tokenizer, no weights."""
        check.settings(settings)
        read = data.read(source, self.settings)
        tokenizer = self._tokenizer(model)
        corpus = tokens.encode(read, tokenizer, settings, system)
        return tokens.preview(read, corpus, tokenizer, settings, samples)

    def targets(self, model: str) -> tuple[Target, ...]:
        """The model's kinds of linear layer, read from the checkpoint's header."""
        return targets.in_checkpoint(self._checkpoint(model))

    def estimate(self, request: TrainRequest, preview: DataPreview | None = None) -> Estimate:
        """Trainable parameters, steps and memory. `problem` is set where it cannot fit."""
        check.settings(request.settings)
        preview = preview or self.preview(request.data, request.model, request.settings, request.system)
        self.engine.start().result()  # the device is known once torch is there
        return self._estimate(request, preview.train_rows, preview.tokens.maximum)

    def _estimate(self, request: TrainRequest, rows: int, longest: int) -> Estimate:
        from comparator.backends import backend_for, resolve
        from comparator.metrics.memory import device_total_and_free

        checkpoint = self._checkpoint(request.model)
        checkpoint.require_full_precision()
        variant = resolve(request.base)
        variant = backend_for(variant).complete(variant, checkpoint)
        device = base.device()
        total, free = device_total_and_free(device)
        # What columns hold is unloaded when it is needed.
        held = sum(r.bytes for r in self.engine.state().residents)
        can_have = min(total, free + held, self.settings.budget_bytes or total)
        return estimate.estimate(
            checkpoint,
            variant,
            request.settings,
            rows=rows,
            longest=longest,
            device=device,
            free_bytes=can_have,
        )

    def _checkpoint(self, model: str) -> Any:
        from comparator.sources import open_checkpoint

        with self._lock:
            if model not in self._checkpoints:
                self._checkpoints[model] = open_checkpoint(model, settings=self.settings)
            return self._checkpoints[model]

    def _tokenizer(self, model: str) -> Any:
        checkpoint = self._checkpoint(model)
        key = str(checkpoint.path)
        if key not in self._tokenizers:
            self.engine.start().result()  # two threads that import torch at once get in each other's way
            self._tokenizers[key] = tokens.load_tokenizer(checkpoint)
        return self._tokenizers[key]

    # ------------------------------------------------------------ a job

    def start(self, request: TrainRequest) -> str:
        """Begin in the background; returns the job's id, which is the adapter's name. Everything that can be known to
        be wrong is raised here: data, settings, targets, memory."""
        self._allow()
        from comparator.training.run import exact

        request = exact(request)
        check.settings(request.settings)
        read = data.read(request.data, self.settings)
        corpus = tokens.encode(read, self._tokenizer(request.model), request.settings, request.system)
        self.engine.start().result()
        longest = max(e.full for e in corpus.all)
        plan = self._estimate(request, len(corpus.train), longest)
        if plan.problem:
            raise Problem(plan.problem.problem, plan.problem.advice)
        name, target = self._place(request)
        about = folder.About(
            name=name,
            adapter=str(target) if request.output else name,
            request=replace(request, name=name),
            data=read.title,
            fingerprint=read.fingerprint,
            train_rows=len(corpus.train),
            eval_rows=len(corpus.held),
            notes=_notes(corpus, request),
        )
        return self._begin(store.new(self._work, about, target, corpus))

    def resume(self, job: str) -> str:
        """Go on from the last checkpoint of a run that failed or was killed."""
        self._allow()
        return self._begin(store.reopen(self._work, job))

    def _begin(self, run: store.Run) -> str:
        job = Job(self.engine, run)
        with self._lock:
            known = self._jobs.get(run.name)
            if known is not None and not known.state().over:
                run.close()
                raise Problem(f"{run.name} is being trained already.", "Wait for it, or choose another name.")
            self._jobs[run.name] = job
        job.begin()
        return run.name

    def _place(self, request: TrainRequest) -> tuple[str, Path]:
        """The adapter's name and folder. Raises `Problem` where it is taken."""
        if request.output:
            target = Path(os.path.expanduser(request.output)).absolute()
            check.output(target)
            return request.name or target.name, target
        taken = {*builtin_adapters(), *trained_names(self.settings), *store.names(self._work)}
        taken |= {n for n, j in list(self._jobs.items()) if not j.state().over}
        name = request.name or check.free_name(request, taken)
        check.name(name, taken)
        return name, trained_folder(self.settings) / name

    def stop(self, job: str) -> None:
        """Returns at once; the job ends with `Trained(partial)` or `Cancelled`."""
        self._job(job).stop()

    def snapshot(self, job: str) -> TrainingState:
        with self._lock:
            known = self._jobs.get(job)
        if known is not None:
            return known.state()
        return store.interrupted(self._work, job)

    def events(self, job: str, after: int = 0) -> Iterator[TrainEvent]:
        """The job's events from number `after` on, then as they come; ends with the job. Closing it stops nothing."""
        return self._job(job).events(after)

    def _job(self, name: str) -> Job:
        with self._lock:
            if name not in self._jobs:
                raise Problem(
                    f"There is no training “{name}” in this process.", "It may have ended with another one."
                )
            return self._jobs[name]

    def running(self) -> TrainingState | None:
        """The job that has the device or waits for it first; what a page that comes back asks for."""
        with self._lock:
            states = [j.state() for j in self._jobs.values()]
        return next((s for s in states if not s.over), None)

    def jobs(self) -> tuple[TrainingState, ...]:
        """This process's jobs, newest first, and runs on disk that a killed process left (`interrupted`)."""
        with self._lock:
            mine = [j.state() for j in reversed(self._jobs.values())]
        names = {s.job for s in mine}
        left = [n for n in store.names(self._work) if n not in names]
        return (*mine, *filter(None, (store.interrupted(self._work, n, strict=False) for n in left)))

    def forget(self, job: str) -> None:
        """Throw a failed or interrupted run away, checkpoints included."""
        with self._lock:
            known = self._jobs.get(job)
            if known is not None and not known.state().over:
                raise Problem(f"{job} is still being trained.", "Stop it first.")
            self._jobs.pop(job, None)
        store.remove(self._work, job)

    # ------------------------------------------------------------ after

    def finished(self) -> tuple[TrainingResult, ...]:
        """The adapters that were trained here, newest first; read from their folders."""
        found = []
        for name in trained_names(self.settings):
            try:
                found.append(folder.read(trained_folder(self.settings) / name, name, name))
            except Problem:  # an adapter that somebody put there by hand
                continue
        return tuple(sorted(found, key=lambda r: r.created_at, reverse=True))

    def result(self, name: str) -> TrainingResult:
        """By name, or by the folder that it was written to."""
        return folder.read(
            self._folder(name), None if name not in trained_names(self.settings) else name, name
        )

    def _folder(self, name: str) -> Path:
        if name in trained_names(self.settings):
            return trained_folder(self.settings) / name
        path = Path(os.path.expanduser(name))
        if not self.settings.public and (path / folder.RECORD).is_file():
            return path.absolute()
        known = ", ".join(trained_names(self.settings)) or "none yet"
        raise Problem(f"No adapter “{name}” was trained here.", f"Trained here: {known}.")

    def remove(self, name: str) -> None:
        """Delete a trained adapter of the list."""
        from comparator import cache as caches

        if name not in trained_names(self.settings):
            raise Problem(f"No adapter “{name}” was trained here.", "Nothing was deleted.")
        caches.remove(trained_folder(self.settings) / name)

    def evaluate(
        self, name: str, variants: list[str], cancel: threading.Event | None = None
    ) -> Iterator[Any]:
        """Loss and perplexity on the held-back samples, for each variant without and with the adapter. Yields
        `comparator.messages.Progress` (fraction, message) and `EvalRow`s as they come, last the `Evaluation`, which
        is kept in training.json too. Takes a turn of the engine; after `cancel` it ends with what it has."""
        from comparator.training.evaluate import evaluate

        self._allow()
        path = self._folder(name)
        return evaluate(self.engine, path, self.result(name), variants, cancel or threading.Event())

    def zipped(self, name: str, into: Path) -> Path:
        """The adapter as NAME.zip in the folder `into`, for a download."""
        path = self._folder(name)
        return folder.zipped(path, path.name, into)

    def push(self, name: str, repo: str, private: bool = True, token: str | None = None) -> str:
        """Upload to the Hub with `token`, or this machine's own login; returns the address."""
        self._allow()
        return folder.push(self._folder(name), repo, private, token)


def _notes(corpus: tokens.Corpus, request: TrainRequest) -> tuple[str, ...]:
    notes = list(corpus.notes)
    cut = sum(e.full > request.settings.max_length for e in corpus.all)
    if cut:
        notes.append(f"{cut:,} samples are longer than {request.settings.max_length:,} tokens and were cut.")
    if request.settings.held_back and not corpus.held:
        notes.append("One sample is too few to hold any back.")
    return tuple(notes)


@cache
def get_trainings() -> Trainings:
    """The registry of this process."""
    return Trainings()
