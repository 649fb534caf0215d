"""One training on the engine's thread: trl's SFTTrainer with peft, watched, stoppable, with checkpoints to go on from.

Imports torch, trl and peft when it runs. Knows nothing of pages; emits the events of `training.types`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparator.sources import open_checkpoint
from comparator.training import base as bases
from comparator.training import folder, targets
from comparator.training.estimate import RESERVE_BYTES, checkpointing_for, estimate, optimizer_for
from comparator.training.settings import TrainSettings
from comparator.training.tokens import Encoded
from comparator.training.types import Estimate, Preparing, Saving, TrainingResult, TrainRequest
from comparator.training.watch import Halted, Watch, callback
from comparator.types import Problem, Stopped, Variant


@dataclass(frozen=True)
class Train:
    """Plain data that pickles. `work`: the run's folder, which holds its checkpoints; `target`: where the adapter goes;
    `resume`: the checkpoint to go on from."""

    job: str
    request: TrainRequest
    variant: Variant
    train: tuple[Encoded, ...]
    held: tuple[Encoded, ...]
    work: str
    target: str
    about: folder.About
    resume: str | None = None

    def run(self, door: Any, cancel: threading.Event, emit: Callable[[Any], None]) -> TrainingResult:
        """Raises `Problem`, or `Stopped` where Stop came before the first step."""
        import torch

        from comparator.metrics import memory

        def told(fraction: float | None, message: str) -> None:
            if cancel.is_set():
                raise Stopped
            emit(Preparing(self.job, fraction, message))

        device = bases.device()
        checkpoint = open_checkpoint(self.request.model, progress=told, settings=door.settings)
        plan = self._room(door, checkpoint, device)
        told(None, "importing trl and peft")
        base = trainer = None
        seeds = torch.get_rng_state()
        try:
            with memory.track(device) as peak, torch.enable_grad():
                base = bases.load(checkpoint, self.variant, device, plan.gradient_checkpointing, told)
                watch = Watch(self.job, self.request, emit, cancel, device)
                watch.notes += [n for n in base.notes if n not in watch.notes]
                tokenizer = door.tokenizer_of(self.request.model)
                trainer = make_trainer(
                    base, tokenizer, self.request, self.train, self.held, Path(self.work), device, watch,
                    checkpoint.source,
                )  # fmt: skip
                told(None, "starting")
                steps = self._train(trainer, watch, cancel)
            emit(Saving(self.job, steps, "the adapter"))
            result = watch.result(
                self.about, trainer, partial=steps < watch.of, peak_bytes=peak.above_bytes, base=base.variant
            )
            return folder.write(Path(self.target), trainer.model, result, self.about, self.held, checkpoint)
        finally:
            if trainer is not None:
                _let_go(trainer)
            base = trainer = None  # the memory goes back before anyone else has the device
            torch.set_rng_state(seeds)
            memory.give_back()

    def _room(self, door: Any, checkpoint: Any, device: str) -> Estimate:
        """Unload what columns hold, until it fits. Raises `Problem` with both figures where it cannot."""
        longest = max(len(e.ids) for e in (*self.train, *self.held))

        def judged(free: int) -> Estimate:
            return estimate(
                checkpoint, self.variant, self.request.settings, rows=len(self.train), longest=longest,
                device=device, free_bytes=free,
            )  # fmt: skip

        plan = judged(0)
        plan = judged(bases.make_room(door.pool(), device, plan.total_bytes + RESERVE_BYTES))
        if plan.problem:
            raise Problem(plan.problem.problem, plan.problem.advice)
        return plan

    def _train(self, trainer: Any, watch: Watch, cancel: threading.Event) -> int:
        """Steps that were done. Raises `Stopped` where there were none."""
        from comparator.errors import explained

        try:
            with explained("train"):
                try:
                    trainer.train(resume_from_checkpoint=self.resume)
                except Halted:
                    pass
                if watch.wants_last_evaluation(trainer):
                    trainer.evaluate()
        except Problem as problem:
            advice = problem.advice
            if problem.problem.startswith("Out of memory"):
                advice = "Lower the batch size or the maximum length, or switch gradient checkpointing on."
            elif advice.startswith("The other columns"):
                advice = "If this looks wrong, report it with the model, the base and the settings."
            raise Problem(problem.problem, advice) from None
        steps = trainer.state.global_step
        if cancel.is_set() and steps == 0:
            raise Stopped
        return steps


def lora_config(given: TrainSettings, names: tuple[str, ...], model: str) -> Any:
    """peft's config; `model` is written into it as the base's name."""
    from peft import LoraConfig

    return LoraConfig(
        r=given.rank,
        lora_alpha=given.alpha,
        lora_dropout=given.dropout,
        target_modules=list(names),
        use_dora=given.dora,
        use_rslora=given.rslora,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model,
    )


def sft_config(
    given: TrainSettings,
    variant: Variant,
    work: Path,
    device: str,
    evaluated: bool,
    steps: int,
    **changes: Any,
) -> Any:
    """The same settings for our runs and for the benchmark's bare SFTTrainer."""
    from trl import SFTConfig

    from comparator.backends import backend_for, loading

    values = backend_for(variant).values(variant)
    dtype = values.get("dtype") or variant.method
    cuda = device.startswith("cuda")
    # A base in fp16 keeps to it, scaled; an fp32 base is trained in fp32; the rest goes in bf16 where the card has it.
    half = cuda and (dtype == "fp16" or (dtype != "fp32" and not loading.supports_bf16(device)))
    full = cuda and not half and dtype != "fp32"
    again = checkpointing_for(given, device)
    config = SFTConfig(
        **{
            "output_dir": str(work / "checkpoints"),
            "max_steps": given.max_steps or -1,
            "num_train_epochs": given.epochs,
            "per_device_train_batch_size": given.batch_size,
            "per_device_eval_batch_size": given.batch_size,
            "gradient_accumulation_steps": given.accumulation,
            "learning_rate": given.learning_rate,
            "lr_scheduler_type": given.scheduler,
            "warmup_steps": given.warmup_steps,
            "weight_decay": given.weight_decay,
            "max_grad_norm": given.max_grad_norm,
            "optim": optimizer_for(given, variant, device),
            "seed": given.seed,
            "data_seed": given.seed,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",  # the watch asks for checkpoints, by the clock
            "save_total_limit": 2,
            "eval_strategy": "steps" if evaluated else "no",
            "eval_steps": (given.eval_every or max(1, steps // 5)) if evaluated else None,
            "eval_on_start": evaluated,
            "report_to": [],
            "disable_tqdm": True,
            "bf16": full,
            "fp16": half,
            "gradient_checkpointing": again,
            "gradient_checkpointing_kwargs": {"use_reentrant": False} if again else None,
            "use_cpu": not cuda,
            "dataloader_pin_memory": cuda,
            "max_length": None,  # cut already
            "dataset_kwargs": {"skip_prepare_dataset": True},
            **changes,
        }
    )
    config._n_gpu = min(config.n_gpu, 1)  # one model on one card, whatever else is in the machine
    return config


def dataset(samples: tuple[Encoded, ...]) -> Any:
    """What the collator takes: ids, and labels that are −100 where there is no loss."""
    import datasets

    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict(
        {"input_ids": [list(e.ids) for e in samples], "labels": [list(e.labels) for e in samples]}
    )


def make_trainer(
    base: bases.Base,
    tokenizer: Any,
    request: TrainRequest,
    train: tuple[Encoded, ...],
    held: tuple[Encoded, ...],
    work: Path,
    device: str,
    watch: Watch,
    model: str,
) -> Any:
    """trl's SFTTrainer, told to be quiet, with our watch on it."""
    import copy
    import logging

    from trl import SFTTrainer

    from comparator.training.estimate import steps_for

    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    given = request.settings
    watch.of = steps_for(given, len(train))

    class Trainer(SFTTrainer):
        """Says nothing to the world, writes no model card, and survives a checkpoint that finds no room."""

        def _send_telemetry(self, *_, **__):
            pass

        def create_model_card(self, *_, **__):
            pass

        def _save_checkpoint(self, model, trial):
            folder.checkpointed(lambda: super(Trainer, self)._save_checkpoint(model, trial), self, watch)

    names = targets.chosen(given, targets.in_model(base.model), model)
    trainer = Trainer(
        base.model,
        args=sft_config(given, base.variant, work, device, bool(held), watch.of),
        train_dataset=dataset(train),
        eval_dataset=dataset(held) if held else None,
        processing_class=copy.deepcopy(tokenizer),  # a padding token is set on it
        peft_config=lora_config(given, names, model),
    )
    for default in list(trainer.callback_handler.callbacks):
        if type(default).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(default)
    trainer.add_callback(callback(watch, trainer, tokenizer))
    return trainer


def _let_go(trainer: Any) -> None:
    """Undo every reference that libraries keep for good, so that model and optimizer really go."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.callbacks.clear()
    trainer.callback_handler.model = trainer.callback_handler.optimizer = None
    trainer.callback_handler.lr_scheduler = trainer.callback_handler.train_dataloader = None
    trainer.accelerator.free_memory()
    model = trainer.model
    trainer.model = trainer.model_wrapped = None
    base = model.get_base_model()
    vars(base).pop("forward", None)  # trl's fused head holds the model it belongs to


def exact(request: TrainRequest) -> TrainRequest:
    """The request with a canonical base. Raises `Problem`."""
    from comparator.backends import resolve

    return replace(request, base=resolve(request.base).notation)
