"""A job: a thread that queues for the engine, trains on it, and records every event."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace

from comparator.backends import resolve
from comparator.core.errors import Stopped, UserError
from comparator.core.result import ErrorInfo
from comparator.engine.explain import explain
from comparator.engine.protocol import Engine
from comparator.engine.queue import asked_by
from comparator.training import artifact
from comparator.training.run_store import Run
from comparator.training.trainer import Train
from comparator.training.types import (
    Cancelled,
    Failed,
    LossPoint,
    Preparing,
    Sample,
    Saving,
    Step,
    Trained,
    TrainEvent,
    TrainingState,
    Waiting,
)
from comparator.util import error_log
from comparator.util.streams import stopped_after


class Job:
    """A training run in a thread of its own. Thread-safe."""

    def __init__(self, engine: Engine, run: Run, visitor: str = "", most_s: float | None = None):
        """`visitor`: whose turn it takes in the queue. After `most_s` on the device it ends as at Stop; None: never."""
        self.engine, self.run, self.visitor, self.most_s = engine, run, visitor, most_s
        self.cancel = threading.Event()
        self._events: list[TrainEvent] = []
        self._changed = threading.Condition()
        self._state = TrainingState(
            run.name, run.about.request, "waiting", "queued",
            checkpoint_step=run.checkpoint[1] if run.checkpoint else None,
        )  # fmt: skip
        self._reported_s = 0.0

    def begin(self) -> None:
        threading.Thread(target=self._work, name=f"training {self.run.name}", daemon=True).start()

    def stop(self) -> None:
        self.cancel.set()
        with self._changed:
            if not self._state.over:
                self._state = replace(self._state, stopping=True, version=self._state.version + 1)
            self._changed.notify_all()

    def state(self) -> TrainingState:
        with self._changed:
            return self._state

    def events(self, after: int = 0) -> Iterator[TrainEvent]:
        while True:
            with self._changed:
                while after >= len(self._events) and not self._state.over:
                    self._changed.wait(1.0)
                new, over = self._events[after:], self._state.over
            yield from new
            after += len(new)
            if over and not new:
                return

    # ------------------------------------------------------------ the thread

    def describe(self) -> str:
        """What the job is doing, shown to those who are queued behind it."""
        state = self.state()
        of = "" if self.run.about.owner else f" of {state.job}"  # a visitor's is not named to others
        if state.status != "training":
            return f"the training{of} is {'being saved' if state.status == 'saving' else 'being prepared'}"
        left = f", about {_seconds(state.eta_s)} left" if state.eta_s is not None else ""
        return f"a training is running, step {state.step:,} of {state.of:,}{left}"

    def _work(self) -> None:
        resumable = False  # whether the run's folder has a checkpoint to resume from

        def on_wait(ahead: int, doing: str) -> None:
            self._add(Waiting(self.run.name, ahead, doing))

        try:
            with asked_by(self.visitor), self.engine.queue.turn(self.cancel, on_wait, self.describe):
                with stopped_after(self.most_s, self.cancel):
                    result = self.engine.work(self._task(), self.cancel, self._add)
            end: TrainEvent = Trained(self.run.name, replace(result, adapter=self.run.about.adapter))
        except Stopped:
            resumable = self.run.checkpoint is not None  # resumed and stopped at once: it stays resumable
            end = Cancelled(self.run.name)
        except BaseException as error:
            problem = error if isinstance(error, UserError) else explain(error, "train")
            error_log.release(error)  # its frames hold the model
            checkpoint = artifact.last_checkpoint(self.run.work)
            resumable = checkpoint is not None
            end = Failed(
                self.run.name,
                problem.problem,
                problem.advice,
                checkpoint[1] if checkpoint else None,
                problem.report.id if problem.report else None,
            )
        self.run.close() if resumable else self.run.discard()
        self._add(end)  # last, when the device is free and the folder is cleaned up

    def _task(self) -> Train:
        run = self.run
        return Train(
            job=run.name,
            request=run.about.request,
            variant=resolve(run.about.request.base),
            train=run.train,
            heldout=run.heldout,
            work=str(run.work),
            target=str(run.target),
            about=run.about,
            resume=str(run.checkpoint[0]) if run.checkpoint else None,
        )

    def _add(self, event: TrainEvent) -> None:
        if isinstance(event, Preparing):
            now = time.monotonic()
            if event.message == self._state.message and now - self._reported_s < 0.1:
                return  # ten updates per second are enough
            self._reported_s = now
        with self._changed:
            self._events.append(event)
            self._state = replace(advanced(self._state, event), version=self._state.version + 1)
            self._changed.notify_all()


def advanced(state: TrainingState, event: TrainEvent) -> TrainingState:
    """The state after an event."""
    match event:
        case Waiting():
            return replace(state, status="waiting", message=f"queued: {event.behind or 'the device is busy'}")
        case Preparing():
            return replace(state, status="preparing", message=event.message, fraction=event.fraction)
        case Step():
            return replace(
                state,
                status="training",
                message="",
                fraction=event.step / max(1, event.of),
                step=event.step,
                of=event.of,
                curve=_with(state.curve, event),
                tok_s=event.tok_s if event.tok_s is not None else state.tok_s,
                memory_bytes=event.memory_bytes or state.memory_bytes,
                elapsed_s=event.elapsed_s,
                eta_s=event.eta_s if event.eta_s is not None else state.eta_s,
            )
        case Sample():
            return replace(state, samples=(*state.samples, event))
        case Saving(what="a checkpoint"):
            return replace(state, checkpoint_step=event.step)
        case Saving():
            return replace(state, status="saving", message=f"saving {event.what}", eta_s=None)
        case Trained(result=result):
            status = "stopped" if result.partial else "finished"
            return replace(
                state, status=status, message="", result=result, curve=result.curve, samples=result.samples,
                step=result.steps, of=result.of, tok_s=result.tok_s, eta_s=None, stopping=False,
            )  # fmt: skip
        case Cancelled():
            return replace(
                state, status="cancelled", message="Stopped before the first step.", stopping=False
            )
        case Failed():
            error = ErrorInfo(event.problem, event.advice, event.error_id)
            return replace(
                state, status="failed", message=event.problem, error=error, eta_s=None, stopping=False,
                checkpoint_step=event.checkpoint_step,
            )  # fmt: skip
    return state


def _with(curve: tuple[LossPoint, ...], step: Step) -> tuple[LossPoint, ...]:
    if step.eval_loss is not None:
        if curve and curve[-1].step == step.step:
            return (*curve[:-1], replace(curve[-1], eval_loss=step.eval_loss))
        return (*curve, LossPoint(step.step, None, step.eval_loss))
    return (*curve, LossPoint(step.step, step.loss, None, step.learning_rate))


def _seconds(count: float) -> str:
    return f"{count:.0f} s" if count < 120 else f"{count / 60:.0f} min"
