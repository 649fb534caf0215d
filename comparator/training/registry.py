"""Training jobs of this process: start, follow, stop, resume. They run in threads that do not depend on a page.

    trainings = Trainings(engine)
    job = trainings.start(TrainRequest(DataSource("pirate"), base="nf4:dq"))   # raises UserError at once
    for event in trainings.events(job): …        # from the first event on; ends with the job
    trainings.snapshot(job)                       # the current state as one object, for a page that polls
    trainings.stop(job)                           # saves what has been trained so far

Training runs on the engine's thread and in its queue, so training and comparing never share the device.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from comparator.adapters.locate import builtin_names as builtin_adapters
from comparator.adapters.locate import trained_folder, trained_names
from comparator.core.errors import UserError
from comparator.core.settings import Settings
from comparator.deploy import zerogpu
from comparator.deploy.limits import limits_of
from comparator.engine.protocol import Engine, OnProgress, ignore
from comparator.sources import isolated
from comparator.training import (
    artifact,
    base_model,
    data,
    memory_estimate,
    run_store,
    strangers_data,
    targets,
    tokenize,
    validation,
)
from comparator.training.job import Job
from comparator.training.settings import TrainSettings
from comparator.training.types import (
    DataPreview,
    DataSource,
    Estimate,
    EvalRow,
    Evaluation,
    Target,
    TrainEvent,
    TrainingResult,
    TrainingState,
    TrainRequest,
)
from comparator.training.visitors import VisitorTrainings
from comparator.util.recent import Recent

_MODELS_KEPT = 4  # headers and tokenizers
_JOBS_KEPT = 50  # that are over, with their events


class Trainings:
    """Jobs and trained adapters. Thread-safe; methods raise `UserError` for what the user can correct."""

    def __init__(self, engine: Engine, settings: Settings | None = None):
        self.engine = engine
        self.settings = settings or self.engine.settings
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        self._tokenizers: Recent[str, Any] = Recent(_MODELS_KEPT)
        self._checkpoints: Recent[str, Any] = Recent(_MODELS_KEPT)

    @property
    def _work(self) -> Path:
        return self.settings.data_dir / "trainings"

    # ------------------------------------------------------------ before training

    def refusal(self) -> str | None:
        """Why nothing is trained here (a public installation, a lent GPU, an engine that cannot), or None."""
        return self.installation_refusal() or self.engine.training_refusal()

    def require_allowed(self) -> None:
        """Raises `UserError` where `refusal()` gives a reason."""
        _require(self.installation_refusal())
        if reason := self.engine.training_refusal():
            raise UserError(reason, "Unset COMPARATOR_RAY_ADDRESS to train on this machine.")

    def installation_refusal(self) -> str | None:
        """Why training is disabled in this installation (a public one, a lent GPU, a setting), whatever its engine can do."""
        if self.settings.training is False:
            return "Training is disabled here (COMPARATOR_TRAINING=0)."
        if self.settings.training:
            return None
        if zerogpu.active():
            return "On ZeroGPU the GPU is assigned for two minutes at most, which is too short to train."
        if self.settings.public:
            return "This is a public installation: training would occupy the device for minutes."
        return None

    def builtin_data(self) -> list[str]:
        """Names of the bundled data sets."""
        return data.builtin_names()

    def preview(
        self,
        source: DataSource,
        model: str,
        settings: TrainSettings,
        system: str | None = None,
        samples: int = 5,
    ) -> DataPreview:
        """The data as the model will see it, with `samples` samples. Not queued; loads a tokenizer, no weights."""
        validation.settings(settings)
        read = data.read(source, self.settings)
        strangers_data.check_system(read.samples, system, self.settings)
        tokenizer = self._tokenizer(model)
        corpus = tokenize.encode(read, tokenizer, settings, system)
        return tokenize.preview(read, corpus, tokenizer, settings, samples)

    def targets(self, model: str) -> tuple[Target, ...]:
        """The model's linear layers by name, read from the checkpoint's header."""
        return targets.in_checkpoint(self._checkpoint(model))

    def estimate(self, request: TrainRequest, preview: DataPreview | None = None) -> Estimate:
        """Trainable parameters, steps and memory; its `problem` is set where the memory is not enough."""
        validation.settings(request.settings)
        preview = preview or self.preview(request.data, request.model, request.settings, request.system)
        self.engine.start().result()  # the device is known once torch is there
        return self._estimate(request, preview.train_rows, preview.tokens.maximum)

    def _estimate(self, request: TrainRequest, rows: int, longest: int) -> Estimate:
        from comparator.backends import backend_for, require_full_precision, resolve
        from comparator.metrics.memory import device_total_and_free

        checkpoint = self._checkpoint(request.model)
        require_full_precision(checkpoint)
        variant = resolve(request.base)
        variant = backend_for(variant).complete(variant, checkpoint)
        device = base_model.device()
        total, free = device_total_and_free(device)
        # Resident columns are unloaded when their memory is needed.
        resident = sum(r.bytes for r in self.engine.state().residents)
        available = min(total, free + resident, self.settings.budget_bytes or total)
        return memory_estimate.estimate(
            checkpoint,
            variant,
            request.settings,
            rows=rows,
            longest=longest,
            device=device,
            free_bytes=available,
        )

    def _checkpoint(self, model: str) -> Any:
        from comparator.sources import look_up, open_checkpoint

        limits = limits_of(self.settings)
        limits.check_source(model)
        checkpoint = self._checkpoints.get(model)
        if checkpoint is None:  # opened without the lock: it may be a long download
            if limits.max_model_parameters is not None:
                limits.check_size(look_up(model, settings=self.settings))
            checkpoint = self._checkpoints.setdefault(model, open_checkpoint(model, settings=self.settings))
        return checkpoint

    def _tokenizer(self, model: str) -> Any:
        checkpoint = self._checkpoint(model)
        if isolated.needed(checkpoint.revision):
            return tokenize.load_tokenizer(checkpoint)  # what it may compute is counted anew
        key = str(checkpoint.path)
        if (known := self._tokenizers.get(key)) is not None:
            return known
        self.engine.start().result()  # torch must not be imported by two threads at once
        return self._tokenizers.setdefault(key, tokenize.load_tokenizer(checkpoint))

    # ------------------------------------------------------------ a job

    def seen_by(self, key: str | None) -> Trainings | VisitorTrainings:
        """What the visitor with this key may see and do: on a public server what is theirs, else everything."""
        return VisitorTrainings(self, key) if self.settings.public else self

    def owner(self, name: str) -> str | None:
        """The digest of the visitor whose job, run or adapter this is; None: the operator's, or there is none."""
        with self._lock:
            job = self._jobs.get(name)
        if job is not None:
            return job.run.about.owner
        return artifact.owner(trained_folder(self.settings) / name) or run_store.owner(self._work, name)

    def owns_adapter(self, name: str) -> bool:
        """Everything is of whoever uses a private installation; see `VisitorTrainings`."""
        return True

    def running_of(self, visitor: str) -> bool:
        """Whether a job that was started for this visitor's turn is not over."""
        with self._lock:
            return any(j.visitor == visitor and not j.state().over for j in self._jobs.values())

    def start(self, request: TrainRequest, owner: str | None = None, visitor: str = "") -> str:
        """Start in the background; returns the job's id, which is the adapter's name. Raises `UserError` for wrong data,
        settings or targets, and for too little memory. `owner`: a digest; `visitor`: whose turn it takes in the queue."""
        self.require_allowed()
        from comparator.training.trainer import exact

        request = exact(request)
        validation.settings(request.settings)
        read = data.read(request.data, self.settings)
        strangers_data.check_system(read.samples, request.system, self.settings)
        corpus = tokenize.encode(read, self._tokenizer(request.model), request.settings, request.system)
        self.engine.start().result()
        longest = max(e.full for e in corpus.all)
        plan = self._estimate(request, len(corpus.train), longest)
        if plan.problem:
            raise UserError(plan.problem.problem, plan.problem.advice)
        name, target = self._place(request)
        about = artifact.About(
            name=name,
            adapter=str(target) if request.output else name,
            request=replace(request, name=name),
            data=read.title,
            fingerprint=read.fingerprint,
            train_rows=len(corpus.train),
            eval_rows=len(corpus.heldout),
            notes=_notes(corpus, request),
            owner=owner,
        )
        return self._begin(run_store.new(self._work, about, target, corpus), visitor)

    def resume(self, job: str, visitor: str = "") -> str:
        """Resume a failed or interrupted run from its last checkpoint."""
        self.require_allowed()
        return self._begin(run_store.reopen(self._work, job), visitor)

    def _begin(self, run: run_store.Run, visitor: str) -> str:
        limits = limits_of(self.settings)
        limits.check_source(run.about.request.model)
        job = Job(self.engine, run, visitor, limits.max_training_s if run.about.owner else None)
        with self._lock:
            running = self._jobs.get(run.name)
            if running is not None and not running.state().over:
                run.close()
                raise UserError(
                    f"{run.name} is already being trained.", "Wait for it, or choose another name."
                )
            self._jobs[run.name] = job
            over = [n for n, j in self._jobs.items() if j.state().over]
            for name in over[:-_JOBS_KEPT]:
                del self._jobs[name]
        job.begin()
        return run.name

    def _place(self, request: TrainRequest) -> tuple[str, Path]:
        """The adapter's name and folder. Raises `UserError` where the name is taken."""
        if request.output:
            target = Path(os.path.expanduser(request.output)).absolute()
            validation.output(target)
            return request.name or target.name, target
        taken = {*builtin_adapters(), *trained_names(self.settings), *run_store.names(self._work)}
        taken |= {n for n, j in list(self._jobs.items()) if not j.state().over}
        name = request.name or validation.free_name(request, taken)
        validation.name(name, taken)
        return name, trained_folder(self.settings) / name

    def stop(self, job: str) -> None:
        """Request a stop and return at once; the job ends with `Trained(partial)` or `Cancelled`."""
        self._job(job).stop()

    def snapshot(self, job: str) -> TrainingState:
        with self._lock:
            running = self._jobs.get(job)
        if running is not None:
            return running.state()
        return run_store.interrupted(self._work, job)

    def events(self, job: str, after: int = 0) -> Iterator[TrainEvent]:
        """The job's events from number `after` on, as they come, until it ends. Closing the iterator stops nothing."""
        return self._job(job).events(after)

    def _job(self, name: str) -> Job:
        with self._lock:
            if name not in self._jobs:
                raise UserError(
                    f"There is no training run “{name}” in this process.",
                    "It may have ended with another one.",
                )
            return self._jobs[name]

    def running(self) -> TrainingState | None:
        """The state of the first job that is not over, for a page that is opened again."""
        with self._lock:
            states = [j.state() for j in self._jobs.values()]
        return next((s for s in states if not s.over), None)

    def jobs(self) -> tuple[TrainingState, ...]:
        """This process's jobs, newest first, then runs on disk whose process was killed (`interrupted`)."""
        with self._lock:
            states = [j.state() for j in reversed(self._jobs.values())]
        names = {s.job for s in states}
        unfinished = [n for n in run_store.names(self._work) if n not in names]
        return (
            *states,
            *filter(None, (run_store.interrupted(self._work, n, strict=False) for n in unfinished)),
        )

    def forget(self, job: str) -> None:
        """Discard a failed or interrupted run, checkpoints included."""
        with self._lock:
            running = self._jobs.get(job)
            if running is not None and not running.state().over:
                raise UserError(f"{job} is still being trained.", "Stop it first.")
            self._jobs.pop(job, None)
        run_store.remove(self._work, job)

    # ------------------------------------------------------------ trained adapters

    def finished(self) -> tuple[TrainingResult, ...]:
        """Results of the adapters that were trained here, newest first; read from their folders."""
        results = []
        for name in trained_names(self.settings):
            try:
                results.append(artifact.read(trained_folder(self.settings) / name, name, name))
            except UserError:  # an adapter that somebody put there by hand
                continue
        return tuple(sorted(results, key=lambda r: r.created_at, reverse=True))

    def result(self, name: str) -> TrainingResult:
        """The result of a trained adapter, by its name or folder."""
        return artifact.read(
            self._folder(name), None if name not in trained_names(self.settings) else name, name
        )

    def _folder(self, name: str) -> Path:
        if name in trained_names(self.settings):
            return trained_folder(self.settings) / name
        path = Path(os.path.expanduser(name))
        if not self.settings.public and (path / artifact.RECORD).is_file():
            return path.absolute()
        known = ", ".join(trained_names(self.settings)) or "none yet"
        raise UserError(f"No adapter “{name}” was trained here.", f"Trained here: {known}.")

    def remove(self, name: str) -> None:
        """Delete a trained adapter of the list."""
        from comparator.util import atomic_dir as caches

        if name not in trained_names(self.settings):
            raise UserError(f"No adapter “{name}” was trained here.", "Nothing was deleted.")
        caches.remove(trained_folder(self.settings) / name)

    def evaluate(
        self,
        name: str,
        variants: list[str],
        cancel: threading.Event | None = None,
        on_progress: OnProgress = ignore,
        on_row: Callable[[EvalRow], None] = ignore,
    ) -> Evaluation:
        """Loss and perplexity on the held-out samples, for each variant without and with the adapter; `on_row` gets each
        row as it is measured. The result is saved in training.json too. Queues for the engine; `cancel` ends it with the
        rows so far. A cluster that cannot train can evaluate."""
        from comparator.training.evaluate import evaluate

        _require(self.installation_refusal())
        path = self._folder(name)
        cancel = cancel or threading.Event()
        return evaluate(self.engine, path, self.result(name), variants, cancel, on_progress, on_row)

    def zipped(self, name: str, into: Path) -> Path:
        """The adapter as NAME.zip in the folder `into`, for a download; returns the file."""
        path = self._folder(name)
        return artifact.zipped(path, path.name, into)

    def push(self, name: str, repo: str, private: bool = True, token: str | None = None) -> str:
        """Upload to the Hub with `token`, or this machine's own login, which is not lent to visitors of a public
        installation; returns the URL."""
        _require(self.installation_refusal())
        token = (token or "").strip() or None
        if self.settings.public and not token:
            raise UserError(
                "Uploading needs a token of yours here.", "Enter one with write access; it is used once."
            )
        return artifact.push(self._folder(name), repo, private, token)


def _require(refusal: str | None) -> None:
    if refusal:
        raise UserError(
            refusal, "Run Quant Comparator on your own machine, or set COMPARATOR_TRAINING=1 on this one."
        )


def _notes(corpus: tokenize.Corpus, request: TrainRequest) -> tuple[str, ...]:
    notes = list(corpus.notes)
    cut = sum(e.full > request.settings.max_length for e in corpus.all)
    if cut:
        notes.append(
            f"{cut:,} samples are longer than {request.settings.max_length:,} tokens and were truncated."
        )
    if request.settings.held_back and not corpus.heldout:
        notes.append("One sample is too few to hold any out.")
    return tuple(notes)
