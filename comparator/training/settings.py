"""The settings of a training, each described once: for the page, the command line and the docs.

Knows nothing of torch, of a page or of a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

ALL_LINEAR = "all-linear"


def _setting(default: Any, title: str, help: str, group: str, **more: Any) -> Any:
    return field(default=default, metadata={"title": title, "help": help, "group": group, **more})


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides what is trained, but the base and the data. `SETTINGS` explains each in a line."""

    rank: int = _setting(
        16,
        "Rank (r)",
        "Width of the adapter: more can learn more and weighs more.",
        "LoRA",
        minimum=1,
        maximum=1024,
    )
    alpha: float = _setting(
        32.0,
        "Alpha",
        "Strength: what the adapter adds is scaled by alpha / rank.",
        "LoRA",
        minimum=0.001,
        maximum=8192,
    )
    dropout: float = _setting(
        0.0, "Dropout", "Share of the adapter's inputs that is dropped at random in each step.", "LoRA",
        minimum=0.0, maximum=0.95,
    )  # fmt: skip
    target_modules: tuple[str, ...] = _setting(
        (ALL_LINEAR,), "Target modules",
        "Which layers get an adapter: all-linear, or names such as q_proj and v_proj.", "LoRA",
    )  # fmt: skip
    dora: bool = _setting(
        False, "DoRA", "Trains the length of each weight row apart from its direction: slower, often better at a low "
        "rank.", "LoRA",
    )  # fmt: skip
    rslora: bool = _setting(
        False, "rsLoRA", "Scales by alpha / √rank instead, which keeps high ranks stable.", "LoRA"
    )
    learning_rate: float = _setting(
        2e-4, "Learning rate", "Size of a step. Too high and the loss jumps or becomes NaN.", "Optimizing",
        minimum=0.0, maximum=1000.0,
    )  # fmt: skip
    scheduler: str = _setting(
        "linear", "Scheduler", "How the learning rate falls towards the end.", "Optimizing",
        choices=("linear", "cosine", "constant", "constant_with_warmup", "polynomial"),
    )  # fmt: skip
    warmup_steps: int = _setting(
        0,
        "Warm-up steps",
        "Steps over which the learning rate rises from 0.",
        "Optimizing",
        minimum=0,
        maximum=1_000_000,
    )
    weight_decay: float = _setting(
        0.0, "Weight decay", "Pulls the adapter's weights towards 0.", "Optimizing", minimum=0.0, maximum=1.0
    )
    max_grad_norm: float = _setting(
        1.0, "Gradient clipping", "Longest gradient that is let through; 0 lets everything through.", "Optimizing",
        minimum=0.0, maximum=1000.0,
    )  # fmt: skip
    optimizer: str = _setting(
        "auto", "Optimizer", "auto: paged_adamw_8bit for a quantized base on CUDA, adamw_torch elsewhere.", "Optimizing",
        choices=("auto", "adamw_torch", "adamw_torch_fused", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_bnb_8bit", "adafactor", "sgd"),
    )  # fmt: skip
    epochs: float = _setting(
        3.0, "Epochs", "How often every sample is seen; steps, where given, decide instead.", "Length",
        minimum=0.01, maximum=1000.0,
    )  # fmt: skip
    max_steps: int = _setting(
        0, "Steps", "Steps to train; 0: as many as the epochs take.", "Length", minimum=0, maximum=10_000_000
    )
    batch_size: int = _setting(
        1,
        "Batch size",
        "Samples at once: more are faster a sample and take more memory.",
        "Length",
        minimum=1,
        maximum=1024,
    )
    accumulation: int = _setting(
        4,
        "Accumulation",
        "Batches whose gradients are added up before a step.",
        "Length",
        minimum=1,
        maximum=4096,
    )
    max_length: int = _setting(
        1024,
        "Max length",
        "Tokens of a sample; what is longer is cut at the end.",
        "Length",
        minimum=8,
        maximum=1_048_576,
    )
    completion_only: bool = _setting(
        True,
        "Completion only",
        "The loss covers the answers alone; the prompts are read and not learnt.",
        "Length",
    )
    gradient_checkpointing: bool | None = _setting(
        None, "Gradient checkpointing",
        "Computes activations twice instead of keeping them: less memory, about a third slower. Unset: on CUDA only.",
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
        0.1, "Held back", "Share of the samples that is never trained on and measures the result; 0: none.", "Watching",
        minimum=0.0, maximum=0.9,
    )  # fmt: skip
    eval_every: int = _setting(
        0, "Evaluate every", "Steps between two evaluations; 0: five times over the run.", "Watching",
        minimum=0, maximum=10_000_000,
    )  # fmt: skip
    sample_every: int = _setting(
        0, "Sample every", "Steps between two sample answers; 0: five times over the run.", "Watching",
        minimum=0, maximum=10_000_000,
    )  # fmt: skip
    sample_tokens: int = _setting(
        48, "Sample tokens", "Tokens of a sample answer.", "Watching", minimum=1, maximum=512
    )
    checkpoint_every: int = _setting(
        0, "Checkpoint every", "Steps between two checkpoints to go on from; 0: every 60 seconds or so.", "Watching",
        minimum=0, maximum=10_000_000,
    )  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """One field of `TrainSettings`, described. `kind` is int, float, bool, choice, names or bool-or-auto."""

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
        """As the command line writes it: `--learning-rate`."""
        return "--" + self.name.replace("_", "-")


def _described() -> tuple[Setting, ...]:
    found = []
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
        found.append(Setting(f.name, default=f.default, kind=kind, **meta))
    return tuple(found)


SETTINGS: tuple[Setting, ...] = _described()
