"""The settings of a training run, each described once for the page, the command line and the docs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

ALL_LINEAR = "all-linear"


def _setting(default: Any, title: str, help: str, group: str, **more: Any) -> Any:
    return field(default=default, metadata={"title": title, "help": help, "group": group, **more})


@dataclass(frozen=True)
class TrainSettings:
    """Hyperparameters of a training run. `SETTINGS` describes each in a line."""

    rank: int = _setting(
        16,
        "Rank (r)",
        "Rank of the adapter: higher can learn more and takes more memory.",
        "LoRA",
        minimum=1,
        maximum=1024,
    )
    alpha: float = _setting(
        32.0,
        "Alpha",
        "The adapter's output is scaled by alpha / rank.",
        "LoRA",
        minimum=0.001,
        maximum=8192,
    )
    dropout: float = _setting(
        0.0, "Dropout", "Probability of dropping an input of the adapter in each step.", "LoRA",
        minimum=0.0, maximum=0.95,
    )  # fmt: skip
    target_modules: tuple[str, ...] = _setting(
        (ALL_LINEAR,), "Target modules",
        "Which layers get an adapter: all-linear, or names such as q_proj and v_proj.", "LoRA",
    )  # fmt: skip
    dora: bool = _setting(
        False, "DoRA", "Trains magnitude and direction of the weights separately: slower, often better at a low "
        "rank.", "LoRA",
    )  # fmt: skip
    rslora: bool = _setting(
        False, "rsLoRA", "Scales by alpha / √rank instead, which keeps high ranks stable.", "LoRA"
    )
    learning_rate: float = _setting(
        2e-4, "Learning rate", "Step size of the optimizer. If too high, the loss jumps or becomes NaN.", "Optimizer",
        minimum=0.0, maximum=1000.0,
    )  # fmt: skip
    scheduler: str = _setting(
        "linear", "Scheduler", "How the learning rate changes over the run.", "Optimizer",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial"),
    )  # fmt: skip
    warmup_steps: int = _setting(
        0,
        "Warm-up steps",
        "Steps over which the learning rate rises from 0.",
        "Optimizer",
        minimum=0,
        maximum=1_000_000,
    )
    weight_decay: float = _setting(
        0.0, "Weight decay", "Pulls the adapter's weights towards 0.", "Optimizer", minimum=0.0, maximum=1.0
    )
    max_grad_norm: float = _setting(
        1.0, "Gradient clipping", "Maximum gradient norm; 0 disables clipping.", "Optimizer",
        minimum=0.0, maximum=1000.0,
    )  # fmt: skip
    optimizer: str = _setting(
        "auto", "Optimizer", "auto: paged_adamw_8bit for a quantized base on CUDA, adamw_torch elsewhere.", "Optimizer",
        choices=("auto", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_bnb_8bit", "adafactor", "sgd"),
    )  # fmt: skip
    epochs: float = _setting(
        3.0, "Epochs", "Passes over the data; ignored if Steps is set.", "Length",
        minimum=0.01, maximum=1000.0,
    )  # fmt: skip
    max_steps: int = _setting(
        0,
        "Steps",
        "Number of optimizer steps; 0: given by the epochs.",
        "Length",
        minimum=0,
        maximum=10_000_000,
    )
    batch_size: int = _setting(
        1,
        "Batch size",
        "Samples per batch: more is faster per sample and takes more memory.",
        "Length",
        minimum=1,
        maximum=1024,
    )
    accumulation: int = _setting(
        4,
        "Accumulation",
        "Gradient accumulation: batches per optimizer step.",
        "Length",
        minimum=1,
        maximum=4096,
    )
    max_length: int = _setting(
        1024,
        "Max length",
        "Maximum tokens per sample; longer samples are truncated.",
        "Length",
        minimum=8,
        maximum=1_048_576,
    )
    completion_only: bool = _setting(
        True,
        "Completion only",
        "Compute the loss on the answers only, not on the prompts.",
        "Length",
    )
    gradient_checkpointing: bool | None = _setting(
        None, "Gradient checkpointing",
        "Recomputes activations in the backward pass: less memory, about a third slower. Default: on CUDA only.",
        "Memory",
    )  # fmt: skip
    seed: int = _setting(
        0,
        "Seed",
        "The same seed gives the same adapter on the same machine.",
        "Length",
        minimum=0,
        maximum=2**32 - 1,
    )
    held_back: float = _setting(
        0.1, "Held-out share", "Share of the samples kept out of training for evaluation; 0: none.", "Monitoring",
        minimum=0.0, maximum=0.9,
    )  # fmt: skip
    eval_every: int = _setting(
        0, "Evaluate every", "Steps between evaluations; 0: five times per run.", "Monitoring",
        minimum=0, maximum=10_000_000,
    )  # fmt: skip
    sample_every: int = _setting(
        0, "Sample every", "Steps between sample answers; 0: five times per run.", "Monitoring",
        minimum=0, maximum=10_000_000,
    )  # fmt: skip
    sample_tokens: int = _setting(
        48, "Sample tokens", "Length of a sample answer in tokens.", "Monitoring", minimum=1, maximum=512
    )
    checkpoint_every: int = _setting(
        0, "Checkpoint every", "Steps between checkpoints; 0: about every 60 seconds.", "Monitoring",
        minimum=0, maximum=10_000_000,
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Description of a field of `TrainSettings`. `kind` is int, float, bool, choice, names or bool-or-auto."""

    name: str
    title: str
    help: str
    group: str
    default: Any
    kind: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None

    @property
    def option(self) -> str:
        """The option of the command line: `--learning-rate`. Saved runs have held_back, an older name, in their files."""
        return "--" + self.name.replace("held_back", "held_out").replace("_", "-")


def _described() -> tuple[Setting, ...]:
    settings = []
    for f in fields(TrainSettings):
        meta = dict(f.metadata)
        if meta.get("choices"):
            kind = "choice"
        elif isinstance(f.default, tuple):
            kind = "names"
        elif f.default is None:
            kind = "bool-or-auto"
        else:
            kind = type(f.default).__name__
        settings.append(Setting(f.name, default=f.default, kind=kind, **meta))
    return tuple(settings)


SETTINGS: tuple[Setting, ...] = _described()
