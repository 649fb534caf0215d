"""transformers' callbacks of a run: they emit an event per step, end the run at NaN or Stop, and make sample answers and
checkpoints when they are due.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from comparator.core.errors import UserError
from comparator.training.types import LossPoint, Preparing, Sample, Saving, Step, TrainingResult, TrainRequest
from comparator.util.compat import trl

CHECKPOINT_S = 60.0


class Halted(Exception):
    """Raised to stop within an evaluation, which transformers' trainer cannot interrupt."""


@dataclass
class Watch:
    """The measurements of a run. `state_dict`/`load_state_dict` save and restore them with a checkpoint."""

    job: str
    request: TrainRequest
    emit: Callable[[Any], None]
    cancel: threading.Event
    device: str
    of: int = 0
    points: dict[int, LossPoint] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    before: str | None = None
    notes: list[str] = field(default_factory=list)
    eval_before: float | None = None
    tokens: int = 0  # processed in steps, masked ones included
    step_s: list[float] = field(default_factory=list)
    train_s: float = 0.0
    last: Step | None = None
    saved_at: float = field(default_factory=time.monotonic)
    _step_start: float = 0.0
    _tokens_before: int = 0

    # ------------------------------------------------------------ steps

    def start_step(self) -> None:
        self._step_start = time.perf_counter()

    def end_step(self) -> None:
        seconds = time.perf_counter() - self._step_start
        self.step_s.append(seconds)
        self.train_s += seconds

    def log(self, step: int, logs: dict[str, Any]) -> None:
        """Record the trainer's logs of a step or an evaluation. Raises `UserError` where a value is not finite."""
        if "loss" in logs:
            loss, rate = float(logs["loss"]), logs.get("learning_rate")
            self._finite(step, loss, "loss")
            if (norm := logs.get("grad_norm")) is not None:
                self._finite(step, float(norm), "gradient")
            count = int(logs.get("num_tokens", self._tokens_before))
            tokens, self._tokens_before = max(0, count - self._tokens_before), count
            self.tokens += tokens
            self._point(step, loss=loss, learning_rate=rate)
            seconds = self.step_s[-1] if self.step_s else None
            median_s = statistics.median(self.step_s[-20:]) if self.step_s else None
            self._report(
                Step(
                    self.job,
                    step,
                    self.of,
                    loss,
                    None,
                    rate,
                    tokens / seconds if seconds else None,
                    self._memory(),
                    self.train_s,
                    median_s * (self.of - step) if median_s is not None else None,
                )  # fmt: skip
            )
        if "eval_loss" in logs:
            loss = float(logs["eval_loss"])
            self._finite(step, loss, "evaluation loss")
            if step == 0 and self.eval_before is None:
                self.eval_before = loss
            self._point(step, eval_loss=loss)
            before = self.last or Step(self.job, step, self.of, None)
            self._report(replace(before, step=step, eval_loss=loss, memory_bytes=self._memory()))

    def _report(self, step: Step) -> None:
        self.last = replace(step, eval_loss=None)
        self.emit(step)

    def _point(self, step: int, **values: Any) -> None:
        self.points[step] = replace(self.points.get(step, LossPoint(step)), **values)

    def _finite(self, step: int, value: float, figure: str) -> None:
        if math.isfinite(value):
            return
        rate = self.request.settings.learning_rate
        raise UserError(
            f"The {figure} became {'NaN' if math.isnan(value) else 'infinite'} at step {step:,}, so training was stopped.",
            f"The learning rate {rate:g} is probably too high: try {rate / 10:g}. This run is not listed.",
        )

    def _memory(self) -> int:
        if self.device.startswith("cuda"):
            import torch

            return torch.cuda.memory_allocated(self.device)
        from comparator.metrics.memory import resident_set

        return resident_set()

    # ------------------------------------------------------------ samples

    def sample_due(self, step: int) -> bool:
        if not (self.request.sample_prompt or "").strip():
            return False
        every = self.request.settings.sample_every or max(1, self.of // 5)
        return step == 0 or step % every == 0 or step == self.of

    def add_sample(self, step: int, model: Any, tokenizer: Any) -> None:
        """Answer the sample prompt greedily; the first answer is the one before training."""
        if step == 0 and self.before is not None:
            return
        if step == 0:
            self.emit(Preparing(self.job, None, "answering the prompt before training"))
        text = answer(model, tokenizer, self.request)
        if self.before is None:
            self.before = text
        sample = Sample(self.job, step, self.request.sample_prompt or "", self.before, text)
        self.samples.append(sample)
        self.emit(sample)

    # ------------------------------------------------------------ checkpoints

    def save_due(self, step: int) -> bool:
        if step >= self.of or step == 0:
            return False
        if every := self.request.settings.checkpoint_every:
            return step % every == 0
        return time.monotonic() - self.saved_at >= CHECKPOINT_S

    def saving(self, step: int) -> None:
        self.saved_at = time.monotonic()
        self.emit(Saving(self.job, step, "a checkpoint"))

    def state_dict(self) -> dict[str, Any]:
        return {
            "points": [asdict(p) for p in self.points.values()],
            "samples": [asdict(s) for s in self.samples],
            "before": self.before,
            "notes": self.notes,
            "eval_before": self.eval_before,
            "tokens": self.tokens,
            "train_s": self.train_s,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.points = {p["step"]: LossPoint(**p) for p in state["points"]}
        self.samples = [Sample(**s) for s in state["samples"]]
        self.before, self.eval_before = state["before"], state["eval_before"]
        self.notes = list(dict.fromkeys([*state["notes"], *self.notes]))
        self.tokens, self.train_s = state["tokens"], state["train_s"]

    # ------------------------------------------------------------ the end

    def wants_last_evaluation(self, trainer: Any) -> bool:
        step = trainer.state.global_step
        point = self.points.get(step)
        return (
            trainer.eval_dataset is not None
            and step > 0
            and not self.cancel.is_set()
            and (point is None or point.eval_loss is None)
        )

    def result(
        self, about: Any, trainer: Any, *, partial: bool, peak_bytes: int | None, base: Any
    ) -> TrainingResult:
        curve = tuple(self.points[s] for s in sorted(self.points))
        losses = [p.loss for p in curve if p.loss is not None]
        evals = [p.eval_loss for p in curve if p.eval_loss is not None and p.step]
        steps = trainer.state.global_step
        notes = list(self.notes)
        if partial:
            notes.insert(0, f"Stopped after {steps:,} of {self.of:,} steps.")
        return TrainingResult(
            name=about.name,
            adapter=about.adapter,
            path="",
            base=base.notation,
            model=self.request.model,
            partial=partial,
            steps=steps,
            of=self.of,
            first_loss=losses[0] if losses else None,
            last_loss=losses[-1] if losses else None,
            eval_before=self.eval_before,
            eval_loss=evals[-1] if evals else None,
            train_s=self.train_s,
            tok_s=self.tokens / self.train_s if self.train_s and self.tokens else None,
            peak_bytes=peak_bytes,
            trainable_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            file_bytes=0,
            data=about.data,
            fingerprint=about.fingerprint,
            train_rows=about.train_rows,
            eval_rows=about.eval_rows,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            notes=tuple(dict.fromkeys((*notes, *about.notes))),
            curve=curve,
            samples=tuple(self.samples),
        )


@contextlib.contextmanager
def answering(model: Any) -> Iterator[None]:
    """A context without gradients and dropout; the model's mode is restored afterwards."""
    import torch

    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def answer(model: Any, tokenizer: Any, request: TrainRequest) -> str:
    """The model's current greedy answer to the sample prompt."""
    import torch

    from comparator.decoding.text import encode

    ids = encode(tokenizer, request.sample_prompt or "", request.system, None).token_ids
    input_ids = torch.tensor([ids], device=next(model.parameters()).device)
    with answering(model):
        out = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=request.settings.sample_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
        )
    return tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def callback(watch: Watch, trainer: Any, tokenizer: Any) -> Any:
    """A transformers `TrainerCallback` that fills `watch`."""
    from transformers import TrainerCallback

    from comparator.training import artifact

    class Watching(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            watch.of = state.max_steps
            if state.global_step:  # resumed
                artifact.restore(watch, trainer)
                watch._tokens_before = trl.trained_tokens(trainer)
            watch.saved_at = time.monotonic()
            if watch.sample_due(0) and not state.global_step:
                watch.add_sample(0, trainer.model, tokenizer)

        def on_step_begin(self, args, state, control, **_):
            watch.start_step()

        def on_substep_end(self, args, state, control, **_):
            if watch.cancel.is_set():
                control.should_training_stop = True

        def on_step_end(self, args, state, control, **_):
            if watch.device.startswith("cuda"):
                import torch

                torch.cuda.synchronize(watch.device)
            watch.end_step()
            if watch.cancel.is_set():
                control.should_training_stop = True
            elif watch.save_due(state.global_step):
                control.should_save = True

        def on_prediction_step(self, args, state, control, **_):
            if watch.cancel.is_set():
                raise Halted

        def on_log(self, args, state, control, logs=None, **_):
            watch.log(state.global_step, logs or {})
            if "loss" in (logs or {}) and watch.sample_due(state.global_step) and not watch.cancel.is_set():
                watch.add_sample(state.global_step, trainer.model, tokenizer)

    return Watching()
