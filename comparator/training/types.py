"""Types of training: the request, previews and estimates, events, and results.

Plain frozen dataclasses that pickle. A field's name ends with its unit; what was not measured is None.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from comparator.core.result import ErrorInfo
from comparator.training.settings import TrainSettings

SCHEMA = 1
Form = Literal["chat", "prompt", "text"]
FORMS: dict[str, str] = {
    "chat": "chat messages: a column with a list of {role, content}",
    "prompt": "prompt and completion: two columns of text, or of chat messages",
    "text": "plain text: one column",
}


# ---------------------------------------------------------------- the request


@dataclass(frozen=True)
class DataSource:
    """Where the samples come from.

    `source`: a built-in data set (`pirate`), a .jsonl, .json, .csv or .parquet file, or a data set of the Hub
    (`user/name`, optionally with `@revision` and `:split`). `form` None: detected. `columns`: (role, column) pairs
    where the names are not enough; roles are messages, prompt, completion, text. `name` is the displayed name (an
    uploaded file's own name). `uploaded`: the file was uploaded through the page, so its path is a temporary one.
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
    """`name`: the adapter's name in the list; None: derived from data and base. `output`: a folder for the adapter
    outside the list. `sample_prompt`: the comparison's prompt, answered before and during training."""

    data: DataSource
    base: str = "nf4:dq"  # variant notation
    model: str = "smollm2-135m"
    settings: TrainSettings = TrainSettings()
    name: str | None = None
    output: str | None = None
    sample_prompt: str | None = None
    system: str | None = None


# ---------------------------------------------------------------- previews and estimates


@dataclass(frozen=True)
class Piece:
    """Consecutive tokens of a sample, decoded: targets of the loss, or masked (grey on the page)."""

    text: str
    is_target: bool
    tokens: int


@dataclass(frozen=True)
class SamplePreview:
    """One sample as the model will see it: chat template applied, truncated to the maximum length."""

    row: int  # 1-based, in the data
    pieces: tuple[Piece, ...]
    tokens: int
    trained_tokens: int
    cut_tokens: int = 0  # truncated at the end


@dataclass(frozen=True)
class TokenStatistics:
    """Over all usable samples, before truncation. Counts are tokens, `rows` are samples."""

    rows: int
    total: int
    trained_tokens: int
    minimum: int
    median: int
    mean: float
    p95: int
    maximum: int
    over_length: int  # samples that are truncated
    cut_tokens: int
    left_out: int  # empty samples, or those without a token to train on
    histogram: tuple[tuple[int, int], ...] = ()  # (up to this many tokens, samples)


@dataclass(frozen=True)
class DataPreview:
    """`columns`: the detected (role, column) pairs. `skipped`: the first (row, reason); `long`: the first (row, tokens).
    `masking`: a sentence on what is masked."""

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
    """Linear layers of one name (`q_proj`): how many the model has, and their input and output features."""

    name: str
    count: int
    inputs: int
    outputs: int


@dataclass(frozen=True)
class Estimate:
    """All bytes are estimates. `fits`: into the memory that is free now; `problem` says why not, with both figures."""

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
        """Trainable parameters as a fraction of all, 0..1."""
        return self.trainable_parameters / max(1, self.total_parameters + self.trainable_parameters)


# ---------------------------------------------------------------- events


@dataclass(frozen=True)
class Waiting:
    """Queued for the device behind `ahead` others. `behind` describes the one that runs (“a comparison is running”)."""

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
    """A finished optimizer step; sent again with `eval_loss` after an evaluation. `loss` is the mean over its batches,
    `tok_s` counts masked tokens too, `memory_bytes` is in use (by CUDA's allocator, or the process)."""

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
    """The end, also after Stop: the adapter trained so far is saved (`result.partial`)."""

    job: str
    result: TrainingResult


@dataclass(frozen=True)
class Cancelled:
    """Stopped before the first step: nothing was saved."""

    job: str


@dataclass(frozen=True)
class Failed:
    """No partly written adapter is listed. `checkpoint_step`: where it can be resumed, or None; `error_id`: the entry in
    the error log, if there is one."""

    job: str
    problem: str
    advice: str
    checkpoint_step: int | None = None
    error_id: str | None = None


TrainEvent = Waiting | Preparing | Step | Sample | Saving | Trained | Cancelled | Failed


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class LossPoint:
    """A point of the loss curve; either loss may be missing."""

    step: int
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class EvalRow:
    """A variant on the held-out samples. `adapter` None: the bare base. `loss` is the mean negative log-likelihood
    of the trained-on tokens, in nats; `perplexity` its exp."""

    variant: str
    adapter: str | None
    loss: float | None
    perplexity: float | None
    tokens: int = 0
    rows: int = 0
    problem: ErrorInfo | None = None


@dataclass(frozen=True)
class Evaluation:
    """An adapter's loss on held-out samples, on variants other than the one it was trained on; one row per column."""

    created_at: str
    base: str
    rows: tuple[EvalRow, ...]
    note: str = ""  # set where nothing was held out


@dataclass(frozen=True)
class TrainingResult:
    """The summary in training.json. `adapter` is what `--adapter` takes: the name, or the folder. `path`: the folder."""

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
    """A job's current state: everything that a page needs to display it. `version` grows with every change.

    `interrupted`: its process was killed; it can be resumed if `checkpoint_step` is not None.
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
    stopping: bool = False
    version: int = 0

    @property
    def over(self) -> bool:
        return self.status in OVER

    @property
    def resumable(self) -> bool:
        return self.status in ("failed", "interrupted") and self.checkpoint_step is not None
