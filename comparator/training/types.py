"""The nouns of training: what is asked for, what is known before, what happens, what is kept.

Plain frozen dataclasses that pickle; nothing of torch, of a page or of a file is known here. Units live in the names;
what was not measured is None.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from comparator.training.settings import TrainSettings
from comparator.types import ErrorInfo

SCHEMA = 1
Form = Literal["chat", "prompt", "text"]
FORMS: dict[str, str] = {
    "chat": "chat messages: a column with a list of {role, content}",
    "prompt": "prompt and completion: two columns of text, or of chat messages",
    "text": "plain text: one column",
}


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
