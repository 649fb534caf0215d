"""The nouns of training: what is asked for, what is known before, what happens, what is kept.

Plain frozen dataclasses that pickle; nothing of torch, of a page or of a file is known here. Units live in the names;
what was not measured is None. `SETTINGS` describes every field of `TrainSettings` once, for the page, the command
line and the docs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from comparator.types import ErrorInfo

SCHEMA = 1
ALL_LINEAR = "all-linear"
Form = Literal["chat", "prompt", "text"]
FORMS: dict[str, str] = {
    "chat": "chat messages: a column with a list of {role, content}",
    "prompt": "prompt and completion: two columns of text, or of chat messages",
    "text": "plain text: one column",
}


# ---------------------------------------------------------------- settings


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


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class DataSource:
    """Where the samples come from.

    `source`: a built-in data set (`pirate`), a .jsonl, .json, .csv or .parquet file, or a data set of the Hub
    (`user/name`, with `@revision` and `:split` where wanted). `form` None: recognized. `columns`: (role, column) pairs
    where the names do not tell: roles are messages, prompt, completion, text. `name` is what people call it (an
    uploaded file's own name); `uploaded`: the file came through the page, so its path is ours.
    """

    source: str
    form: Form | None = None
    columns: tuple[tuple[str, str], ...] = ()
    name: str | None = None
    uploaded: bool = False

    @property
    def title(self) -> str:
        return self.name or self.source


@dataclass(frozen=True)
class TrainRequest:
    """`name`: what the adapter is called in the list; None: made from data and base. `output`: a folder of one's own
    for the adapter instead of the list's. `sample_prompt`: the comparison's prompt, answered before and while."""

    data: DataSource
    base: str = "nf4:dq"  # variant notation
    model: str = "smollm2-135m"
    settings: TrainSettings = TrainSettings()
    name: str | None = None
    output: str | None = None
    sample_prompt: str | None = None
    system: str | None = None


# ---------------------------------------------------------------- what is known before


@dataclass(frozen=True)
class Piece:
    """A run of tokens of a sample, decoded. `learnt`: in the loss; otherwise it is masked (grey on the page)."""

    text: str
    learnt: bool
    tokens: int


@dataclass(frozen=True)
class SamplePreview:
    """One sample exactly as the model will see it: chat template applied, cut to the maximum length."""

    row: int  # 1-based, in the data
    pieces: tuple[Piece, ...]
    tokens: int
    learnt_tokens: int
    cut_tokens: int = 0  # taken off at the end


@dataclass(frozen=True)
class TokenStatistics:
    """Over all usable samples, before cutting. Counts are tokens, `rows` are samples."""

    rows: int
    total: int
    learnt: int
    minimum: int
    median: int
    mean: float
    p95: int
    maximum: int
    over_length: int  # samples that are cut
    cut_tokens: int
    left_out: int  # samples of which nothing would be learnt, or that are empty
    histogram: tuple[tuple[int, int], ...] = ()  # (up to this many tokens, samples)


@dataclass(frozen=True)
class DataPreview:
    """`columns`: what was recognized, (role, column). `skipped` and `long`: (row, why or tokens), the first of them.
    `masking` says in words what is greyed."""

    title: str
    form: Form
    columns: tuple[tuple[str, str], ...]
    other_columns: tuple[str, ...]
    rows: int
    train_rows: int
    eval_rows: int
    fingerprint: str  # sha256 of the samples as they are used
    samples: tuple[SamplePreview, ...]
    tokens: TokenStatistics
    long: tuple[tuple[int, int], ...]
    skipped: tuple[tuple[int, str], ...]
    notes: tuple[str, ...]
    masking: str = ""


@dataclass(frozen=True)
class Target:
    """A kind of linear layer of the model: `q_proj`, how many there are, their size (in, out)."""

    name: str
    count: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Estimate:
    """Bytes are estimates and called so. `fits`: into what is free now; `problem` says why not, with both figures."""

    steps: int
    trainable_parameters: int
    total_parameters: int
    weight_bytes: int
    adapter_bytes: int  # weights and gradients
    optimizer_bytes: int
    activation_bytes: int
    total_bytes: int
    free_bytes: int
    device: str
    optimizer: str
    gradient_checkpointing: bool
    targets: tuple[str, ...]
    problem: ErrorInfo | None = None
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.problem is None

    @property
    def share(self) -> float:
        """Trainable of all parameters, 0..1."""
        return self.trainable_parameters / max(1, self.total_parameters + self.trainable_parameters)


# ---------------------------------------------------------------- what happens


@dataclass(frozen=True)
class Waiting:
    """Somebody else has the device. `behind` says who, in words (“a comparison”)."""

    job: str
    ahead: int
    behind: str = ""


@dataclass(frozen=True)
class Preparing:
    """Before the first step: reading, loading, quantizing. `fraction` 0..1 or None."""

    job: str
    fraction: float | None
    message: str


@dataclass(frozen=True)
class Step:
    """A step is done; after an evaluation it comes once more with `eval_loss`. `loss` is the mean over its batches; `tok_s` counts every token that went through;
    `memory_bytes` is what is in use (CUDA's allocator, or the process)."""

    job: str
    step: int
    of: int
    loss: float | None
    eval_loss: float | None = None
    learning_rate: float | None = None
    tok_s: float | None = None
    memory_bytes: int | None = None
    elapsed_s: float = 0.0
    eta_s: float | None = None


@dataclass(frozen=True)
class Sample:
    """The answer to the sample prompt before training, and now."""

    job: str
    step: int
    prompt: str
    before: str
    now: str


@dataclass(frozen=True)
class Saving:
    """`what`: “a checkpoint” or “the adapter”."""

    job: str
    step: int
    what: str


@dataclass(frozen=True)
class Trained:
    """The end, also after Stop: what was trained so far is kept (`result.partial`)."""

    job: str
    result: TrainingResult


@dataclass(frozen=True)
class Cancelled:
    """Stopped before the first step: nothing was kept."""

    job: str


@dataclass(frozen=True)
class Failed:
    """Nothing that is half-written is listed; `checkpoint_step`: from where it can be resumed, if anywhere."""

    job: str
    problem: str
    advice: str
    checkpoint_step: int | None = None


TrainEvent = Waiting | Preparing | Step | Sample | Saving | Trained | Cancelled | Failed


# ---------------------------------------------------------------- what is kept


@dataclass(frozen=True)
class LossPoint:
    """A point of the curve; either may be missing."""

    step: int
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class EvalRow:
    """A variant on the held-back samples. `adapter` None: the bare base. `loss` is the mean negative log-likelihood
    of the learnt tokens, in nats; `perplexity` its exp."""

    variant: str
    adapter: str | None
    loss: float | None
    perplexity: float | None
    tokens: int = 0
    rows: int = 0
    problem: ErrorInfo | None = None


@dataclass(frozen=True)
class Evaluation:
    """“Trained on nf4, how does it do on bf16, int8, GPTQ?” `rows` of data that nothing was trained on."""

    created_at: str
    base: str
    rows: tuple[EvalRow, ...]
    note: str = ""  # said where nothing was held back


@dataclass(frozen=True)
class TrainingResult:
    """What training.json holds, in short. `adapter` is what `--adapter` takes: the name, or the folder."""

    name: str
    adapter: str
    path: str
    base: str
    model: str
    partial: bool
    steps: int
    of: int
    first_loss: float | None
    last_loss: float | None
    eval_before: float | None
    eval_loss: float | None
    train_s: float
    tok_s: float | None
    peak_bytes: int | None
    trainable_parameters: int
    file_bytes: int
    data: str
    fingerprint: str
    train_rows: int
    eval_rows: int
    created_at: str
    notes: tuple[str, ...] = ()
    curve: tuple[LossPoint, ...] = ()
    samples: tuple[Sample, ...] = ()
    evaluation: Evaluation | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Status = Literal[
    "waiting", "preparing", "training", "saving", "finished", "stopped", "cancelled", "failed", "interrupted"
]
OVER: frozenset[str] = frozenset({"finished", "stopped", "cancelled", "failed", "interrupted"})


@dataclass(frozen=True)
class TrainingState:
    """A job as it stands: everything that somebody who comes back needs. `version` grows with every change.

    `interrupted` is a run that a killed process left; it can be resumed where `checkpoint_step` is not None.
    """

    job: str
    request: TrainRequest
    status: Status
    message: str = ""
    fraction: float | None = None
    step: int = 0
    of: int = 0
    curve: tuple[LossPoint, ...] = ()
    tok_s: float | None = None
    memory_bytes: int | None = None
    elapsed_s: float = 0.0
    eta_s: float | None = None
    samples: tuple[Sample, ...] = ()
    result: TrainingResult | None = None
    error: ErrorInfo | None = None
    checkpoint_step: int | None = None
    started_at: str = ""
    stopping: bool = False
    version: int = 0

    @property
    def over(self) -> bool:
        return self.status in OVER

    @property
    def resumable(self) -> bool:
        return self.status in ("failed", "interrupted") and self.checkpoint_step is not None
