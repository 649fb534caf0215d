"""One training run on the engine's thread: trl's SFTTrainer with peft, cancellable, with checkpoints to resume from.

Imports torch, trl and peft when it runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparator.core.errors import Stopped, UserError
from comparator.core.variant import Variant
from comparator.metrics.memory import RESERVE_BYTES
from comparator.sources import open_checkpoint
from comparator.sources.isolated import IsolatedTokenizer
from comparator.training import artifact, targets
from comparator.training import base_model as bases
from comparator.training.callbacks import Halted, Watch, callback
from comparator.training.memory_estimate import checkpointing_for, estimate, optimizer_for
from comparator.training.settings import TrainSettings
from comparator.training.tokenize import Encoded, load_tokenizer
from comparator.training.types import Estimate, Preparing, Saving, TrainingResult, TrainRequest
from comparator.util.compat import trl
from comparator.util.compat.transformers import use_one_gpu


@dataclass(frozen=True)
class Train:
    """The task, which pickles. `work`: the run's folder with its checkpoints; `target`: the adapter's folder;
    `resume`: the checkpoint to resume from."""

    job: str
    request: TrainRequest
    variant: Variant
    train: tuple[Encoded, ...]
    heldout: tuple[Encoded, ...]
    work: str
    target: str
    about: artifact.About
    resume: str | None = None

    def run(self, context: Any, cancel: threading.Event, emit: Callable[[Any], None]) -> TrainingResult:
        """Train and write the adapter. Raises `UserError`, or `Stopped` if stopped before the first step."""
        import torch

        from comparator.metrics import memory

        def on_progress(fraction: float | None, message: str) -> None:
            if cancel.is_set():
                raise Stopped
            emit(Preparing(self.job, fraction, message))

        device = bases.device()
        checkpoint = open_checkpoint(self.request.model, progress=on_progress, settings=context.settings)
        plan = self._make_room(context, checkpoint, device)
        on_progress(None, "importing trl and peft")
        base = trainer = None
        seeds = torch.get_rng_state()
        try:
            with memory.track(device) as peak, torch.enable_grad():
                base = bases.load(checkpoint, self.variant, device, plan.gradient_checkpointing, on_progress)
                watch = Watch(self.job, self.request, emit, cancel, device)
                watch.notes += [n for n in base.notes if n not in watch.notes]
                tokenizer = load_tokenizer(checkpoint)
                trainer = make_trainer(
                    base, tokenizer, self.request, self.train, self.heldout, Path(self.work), device, watch,
                    checkpoint.source,
                )  # fmt: skip
                on_progress(None, "starting")
                steps = self._train(trainer, watch, cancel)
            emit(Saving(self.job, steps, "the adapter"))
            result = watch.result(
                self.about, trainer, partial=steps < watch.of, peak_bytes=peak.above_bytes, base=base.variant
            )
            return artifact.write(
                Path(self.target), trainer.model, result, self.about, self.heldout, checkpoint
            )
        finally:
            if trainer is not None:
                _release(trainer)
            base = trainer = None  # free the memory before another task gets the device
            torch.set_rng_state(seeds)
            memory.give_back()

    def _make_room(self, context: Any, checkpoint: Any, device: str) -> Estimate:
        """Unload columns until the run fits. Raises `UserError` with both figures where it cannot."""
        longest = max(len(e.ids) for e in (*self.train, *self.heldout))

        def estimated(free: int) -> Estimate:
            return estimate(
                checkpoint, self.variant, self.request.settings, rows=len(self.train), longest=longest,
                device=device, free_bytes=free,
            )  # fmt: skip

        plan = estimated(0)
        plan = estimated(context.pool().free_for(plan.total_bytes + RESERVE_BYTES, device))
        if plan.problem:
            raise UserError(plan.problem.problem, plan.problem.advice)
        return plan

    def _train(self, trainer: Any, watch: Watch, cancel: threading.Event) -> int:
        """Train; returns the number of finished steps. Raises `Stopped` if there are none."""
        from comparator.engine.explain import explained

        try:
            with explained("train"):
                try:
                    trainer.train(resume_from_checkpoint=self.resume)
                except Halted:
                    pass
                if watch.wants_last_evaluation(trainer):
                    trainer.evaluate()
        except UserError as problem:
            advice = problem.advice
            if problem.problem.startswith("Out of memory"):
                advice = "Lower the batch size or the maximum length, or turn on gradient checkpointing."
            elif advice.startswith("The other variants"):
                advice = "If this looks wrong, report it with the model, the base and the settings."
            raise UserError(problem.problem, advice, problem.report) from None
        steps = trainer.state.global_step
        if cancel.is_set() and steps == 0:
            raise Stopped
        return steps


def lora_config(settings: TrainSettings, names: tuple[str, ...], model: str) -> Any:
    """peft's config for the modules `names`; `model` is stored in it as the base's name."""
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(names),
        use_dora=settings.dora,
        use_rslora=settings.rslora,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=model,
    )


def sft_config(
    settings: TrainSettings,
    variant: Variant,
    work: Path,
    device: str,
    evaluated: bool,
    steps: int,
    **changes: Any,
) -> Any:
    """trl's SFTConfig, also for the benchmark's plain SFTTrainer. `steps`: of the whole run; `changes`: overrides."""
    from trl import SFTConfig

    from comparator.backends import backend_for, dtypes

    dtype = backend_for(variant).training(variant, device).dtype
    cuda = device.startswith("cuda")
    # A base in fp16 is trained in fp16 with loss scaling, fp32 in fp32, the rest in bf16 where the card supports it.
    half = cuda and (dtype == "fp16" or (dtype != "fp32" and not dtypes.supports_bf16(device)))
    full = cuda and not half and dtype != "fp32"
    checkpointing = checkpointing_for(settings, device)
    config = SFTConfig(
        **{
            "output_dir": str(work / "checkpoints"),
            "max_steps": settings.max_steps or -1,
            "num_train_epochs": settings.epochs,
            "per_device_train_batch_size": settings.batch_size,
            "per_device_eval_batch_size": settings.batch_size,
            "gradient_accumulation_steps": settings.accumulation,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": settings.scheduler,
            "warmup_steps": settings.warmup_steps,
            "weight_decay": settings.weight_decay,
            "max_grad_norm": settings.max_grad_norm,
            "optim": optimizer_for(settings, variant, device),
            "seed": settings.seed,
            "data_seed": settings.seed,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "save_strategy": "no",  # `Watch.save_due` requests checkpoints by time
            "save_total_limit": 2,
            "eval_strategy": "steps" if evaluated else "no",
            "eval_steps": (settings.eval_every or max(1, steps // 5)) if evaluated else None,
            "eval_on_start": evaluated,
            "report_to": [],
            "disable_tqdm": True,
            "bf16": full,
            "fp16": half,
            "gradient_checkpointing": checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
            "use_cpu": not cuda,
            "dataloader_pin_memory": cuda,
            "max_length": None,  # already truncated
            "dataset_kwargs": {"skip_prepare_dataset": True},
            **changes,
        }
    )
    use_one_gpu(config)
    return config


def dataset(samples: tuple[Encoded, ...]) -> Any:
    """A data set for trl's collator: `input_ids`, and `labels` that are −100 where there is no loss."""
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
    heldout: tuple[Encoded, ...],
    work: Path,
    device: str,
    watch: Watch,
    model: str,
) -> Any:
    """trl's SFTTrainer with the callback of `watch` and without console output."""
    import logging

    from comparator.training.memory_estimate import steps_for

    logging.getLogger("transformers.trainer").setLevel(logging.ERROR)
    settings = request.settings
    watch.of = steps_for(settings, len(train))

    names = targets.select(settings, targets.in_model(base.model), model)
    trainer = trl.quiet_trainer(lambda save, trainer: artifact.checkpointed(save, trainer, watch))(
        base.model,
        args=sft_config(settings, base.variant, work, device, bool(heldout), watch.of),
        train_dataset=dataset(train),
        eval_dataset=dataset(heldout) if heldout else None,
        processing_class=_processing_class(tokenizer),
        peft_config=lora_config(settings, names, model),
    )
    for default in list(trainer.callback_handler.callbacks):
        if type(default).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(default)
    trainer.add_callback(callback(watch, trainer, tokenizer))
    return trainer


def _processing_class(tokenizer: Any) -> Any:
    """What trl gets as the tokenizer: a copy, since it sets a padding token. The samples are tokenized already, so for one
    that lives in another process a vocabulary of its special tokens is enough."""
    import copy

    if not isinstance(tokenizer, IsolatedTokenizer):
        return copy.deepcopy(tokenizer)
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    special = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
    special = {name: token for name, token in special.items() if token is not None}
    ids = {token: getattr(tokenizer, f"{name}_id") for name, token in special.items()}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(ids)), **special)


def _release(trainer: Any) -> None:
    """Drop the references that libraries hold, so that model and optimizer are freed."""
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.callback_handler.callbacks.clear()
    trainer.callback_handler.model = trainer.callback_handler.optimizer = None
    trainer.callback_handler.lr_scheduler = trainer.callback_handler.train_dataloader = None
    trainer.accelerator.free_memory()
    model = trainer.model
    trainer.model = trainer.model_wrapped = None
    trl.drop_fused_head(model.get_base_model())


def exact(request: TrainRequest) -> TrainRequest:
    """The request with a canonical base. Raises `UserError`."""
    from comparator.backends import resolve

    return replace(request, base=resolve(request.base).notation)
