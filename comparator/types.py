"""The nouns: what goes in, what comes out, what is saved and shared.

Plain frozen dataclasses that pickle. Knows nothing of torch, of a page or of a file. Units live in the
names (`ttft_s`, `peak_bytes`, `decode_tok_s`); what was not measured is `None`, never 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

SCHEMA = 1
BUILTIN_MODEL = "smollm2-135m"


class Problem(Exception):
    """Something a person can act on: what is wrong, and a way out.

    Raised anywhere below the page; shown as it is by the page, the command line and the document.
    """

    def __init__(self, problem: str, advice: str = ""):
        super().__init__(problem, advice)
        self.problem = problem
        self.advice = advice

    def __str__(self) -> str:
        return f"{self.problem} {self.advice}".strip()


class Stopped(Exception):
    """Stop was asked for; raised at the next place where it can be honoured."""


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Variant:
    """A method plus its options: `nf4:dq,compute=fp16`. Build one with `comparator.backends.resolve`."""

    method: str
    source: str | None = None
    revision: str | None = None
    options: tuple[tuple[str, str | None], ...] = ()  # (name, value); a bare word has value None

    @property
    def notation(self) -> str:
        from comparator.notation import format_variant

        return format_variant(self)

    def __str__(self) -> str:
        return self.notation


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter to put on a variant: `pirate`, `user/repo@rev*0.5`, `pirate:merged`."""

    source: str
    revision: str | None = None
    scale: float = 1.0
    merged: bool = False

    @property
    def notation(self) -> str:
        from comparator.notation import format_adapter

        return format_adapter(self)

    def __str__(self) -> str:
        return self.notation


@dataclass(frozen=True)
class Cell:
    """One column: a variant with an adapter, or none."""

    variant: Variant
    adapter: Adapter | None = None

    @property
    def label(self) -> str:
        return self.variant.notation + (f" + {self.adapter.notation}" if self.adapter else "")


@dataclass(frozen=True)
class GenerationSettings:
    """How to decode; the same for every column. `temperature` 0 is greedy; `top_k` 0 and `top_p` 1 are off."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    seed: int = 0
    repeats: int = 1
    decode: str = "auto"  # auto | both (auto, and eager too) | eager | graph | compiled


@dataclass(frozen=True)
class EvalSettings:
    """The longer text that fidelity is measured on, and how it is cut. `text` None: the text we ship."""

    text: str | None = None
    name: str = "built-in text"
    context: int = 512
    stride: int = 512


@dataclass(frozen=True)
class Request:
    """One comparison, as asked for."""

    model: str
    cells: tuple[Cell, ...]
    prompt: str
    system: str | None = None
    chat: bool | None = None  # None: the chat template where the model has one
    settings: GenerationSettings = field(default_factory=GenerationSettings)
    reference: Cell | None = None  # None: the most precise column
    fidelity: Literal["none", "prompt", "text"] = "prompt"
    evaluation: EvalSettings = field(default_factory=EvalSettings)
    evict: bool = True  # make room by unloading what was used longest ago
    max_memory: str | None = None  # "0=6GiB,cpu=20GiB": accelerate's device map
    parallel: bool = False  # columns on different devices of a cluster at the same time


# ---------------------------------------------------------------- what is measured


@dataclass(frozen=True)
class Chunk:
    """Text and token ids produced since the last chunk, with a timestamp (`time.perf_counter`, s) each."""

    text: str
    token_ids: tuple[int, ...]
    times_s: tuple[float, ...]


@dataclass(frozen=True)
class RunFigures:
    ttft_s: float | None = None
    decode_tok_s: float | None = None


@dataclass(frozen=True)
class Latency:
    """Times of one column; medians over `runs` where there are several. See docs/architecture.md."""

    load_s: float | None = None
    prepare_s: float | None = None
    ttft_s: float | None = None
    prefill_tok_s: float | None = None
    decode_tok_s: float | None = None
    itl_s: tuple[float, ...] = ()
    itl_p50_s: float | None = None
    itl_p90_s: float | None = None
    itl_p99_s: float | None = None
    total_s: float | None = None
    runs: tuple[RunFigures, ...] = ()
    adapter_load_s: float | None = (
        None  # reading the adapter and fitting it to the resident base; None: it was there
    )
    eager_decode_tok_s: float | None = (
        None  # the same prompt decoded eagerly as well, where `decode` is “both”
    )
    floor_tok_s: float | None = (
        None  # what reading the weights once a token allows, at a copy's bandwidth here
    )
    adapter_switch_s: float | None = None  # putting a fitted adapter on and taking it off again


@dataclass(frozen=True)
class Memory:
    """Bytes. `loaded_*` right after loading, the rest after the warm-up: what actually runs."""

    loaded_weight_bytes: int | None = None
    loaded_quant_state_bytes: int | None = None
    weight_bytes: int | None = None
    quant_state_bytes: int | None = None
    adapter_bytes: int | None = None
    resident_bytes: int | None = None
    shared_bytes: int | None = (
        None  # of resident_bytes: what a variant loaded earlier holds too, one storage for both
    )
    load_peak_bytes: int | None = None
    run_peak_bytes: int | None = None
    kv_cache_bytes: int | None = None
    footprint_bytes: int | None = None  # transformers' get_memory_footprint(), for comparison
    peak_source: str | None = None  # "CUDA allocator" | "process (resident set)"


@dataclass(frozen=True)
class Energy:
    joules_per_token: float | None = None


@dataclass(frozen=True)
class TopToken:
    """One candidate for a position: its text and probability."""

    token: str
    p: float


@dataclass(frozen=True)
class PromptFidelity:
    """The reference's own answer, scored by this column the way it decodes. One entry per reference token."""

    token_ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()  # their texts, for display
    kl: tuple[float, ...] = ()  # KL(reference || column), nats
    p: tuple[float, ...] = ()
    reference_p: tuple[float, ...] = ()
    rank: tuple[int, ...] = ()  # 0: this column's greedy choice is the reference's token
    first_difference: int | None = None
    top: tuple[tuple[TopToken, ...], ...] = ()
    reference_top: tuple[tuple[TopToken, ...], ...] = ()


@dataclass(frozen=True)
class AdapterDrift:
    """How an adapter's effect differs between this column's base and the reference's; nats, means over `tokens`
    tokens of the reference's answer. comparator/adapters/drift.py defines it."""

    kl: float  # from the effect on the reference base to the effect here
    effect: float  # KL(reference base with it || without): the size of the effect there
    effect_here: float  # the same on this column's base
    tokens: int


@dataclass(frozen=True)
class Fidelity:
    prompt: PromptFidelity | None = None
    text: dict[str, Any] | None = None  # comparator/metrics/fidelity.py writes out what is in it
    refused: str | None = None  # why fidelity could not be measured for this column
    adapter: AdapterDrift | None = None  # columns with an adapter, but for the reference's own


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a weight's quant state (absmax, codebook, scales …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class LoadedLayer:
    """A layer right after loading, where the first use changed how it is stored."""

    storage_dtype: str
    storage_shape: tuple[int, ...]
    bytes: int
    quant_state_bytes: int


@dataclass(frozen=True)
class LayerRow:
    """One stored tensor of the model: how it is kept, and what it means."""

    name: str
    module_class: str
    param_class: str
    storage_dtype: str
    logical_dtype: str
    compute_dtype: str
    shape: tuple[int, ...]
    storage_shape: tuple[int, ...]
    parameters: int
    bytes: int
    quant_state_bytes: int
    bits_per_weight: float | None
    device: str
    tied_to: str | None = None
    adapter_rank: int | None = None
    adapter_dtype: str | None = None
    adapter_bytes: int | None = None
    loaded: LoadedLayer | None = None
    state: tuple[StateTensor, ...] = ()
    error: dict[str, float] | None = None  # weight error against the reference column


@dataclass(frozen=True)
class ModelInfo:
    source: str
    revision: str | None = None
    architecture: str | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class ErrorInfo:
    problem: str
    advice: str = ""


@dataclass(frozen=True)
class AdapterInfo:
    """What a column's adapter is; its own `revision` is a commit. `parameters` are the adapter's alone."""

    source: str
    revision: str | None = None
    kind: str | None = None  # "LoRA", "DoRA", "rsLoRA", "IA³" …
    base_model: str | None = None  # what it was trained on, as its config says
    rank: int | None = None  # the largest, where modules differ
    alpha: float | None = None
    scaling: float | None = None
    targets: tuple[str, ...] = ()
    parameters: int | None = None
    file_bytes: int | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Environment:
    device: str | None = None
    driver: str | None = None
    cpu: str | None = None
    memory_bytes: int | None = None
    python: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    host: str | None = None  # the node of a cluster, by the name it has there


@dataclass(frozen=True)
class CellResult:
    """Everything measured in one column."""

    variant: str
    adapter: str | None = None
    status: Literal["ok", "failed", "stopped"] = "ok"
    error: ErrorInfo | None = None
    notes: tuple[str, ...] = ()
    model: ModelInfo | None = None
    kernel: str | None = None
    decode_path: str | None = None
    text: str = ""
    token_ids: tuple[int, ...] = ()
    finish_reason: Literal["eos", "length", "stopped"] | None = None
    latency: Latency = field(default_factory=Latency)
    memory: Memory = field(default_factory=Memory)
    energy: Energy | None = None
    fidelity: Fidelity | None = None
    layers: tuple[LayerRow, ...] = ()
    adapter_info: AdapterInfo | None = None
    environment: Environment | None = None  # None: the comparison's; its own where columns differ in it

    @property
    def label(self) -> str:
        return self.variant + (f" + {self.adapter}" if self.adapter else "")


@dataclass(frozen=True)
class PromptInfo:
    text: str
    system: str | None = None
    chat: bool = False
    token_count: int | None = None


@dataclass(frozen=True)
class CellName:
    variant: str
    adapter: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The comparison document, schema 1. `comparator.document` turns it to and from JSON."""

    id: str
    created_at: str  # UTC, ISO 8601
    prompt: PromptInfo
    settings: GenerationSettings
    environment: Environment
    model: str = BUILTIN_MODEL
    reference: CellName | None = None
    cells: tuple[CellResult, ...] = ()
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def cell(self, variant: str, adapter: str | None = None) -> CellResult | None:
        return next((c for c in self.cells if c.variant == variant and c.adapter == adapter), None)

    @property
    def ok(self) -> bool:
        return bool(self.cells) and all(c.status == "ok" for c in self.cells)


# ---------------------------------------------------------------- what happens meanwhile


@dataclass(frozen=True)
class Queued:
    """Somebody else is being served; `ahead` requests come first. `doing`: what is being done, where it was said."""

    ahead: int
    doing: str = ""


@dataclass(frozen=True)
class Loading:
    cell: Cell
    fraction: float | None
    message: str


@dataclass(frozen=True)
class Generating:
    """`round` counts from 0 to repeats − 1; only round 0 carries the text that is shown."""

    cell: Cell
    chunk: Chunk
    round: int = 0


@dataclass(frozen=True)
class Scoring:
    cell: Cell
    fraction: float | None
    message: str


@dataclass(frozen=True)
class Generated:
    """A first, incomplete result: text and figures of a column, before later rounds and fidelity."""

    cell: Cell
    result: CellResult


@dataclass(frozen=True)
class Finished:
    cell: Cell
    result: CellResult


@dataclass(frozen=True)
class Failed:
    cell: Cell
    problem: str
    advice: str
    result: CellResult


@dataclass(frozen=True)
class Done:
    comparison: Comparison


Event = Queued | Loading | Generating | Scoring | Generated | Finished | Failed | Done


# ---------------------------------------------------------------- what is there


@dataclass(frozen=True)
class ModelFacts:
    """What is known of a model before anything is loaded, from its config and safetensors headers."""

    source: str
    revision: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    dtype: str | None = None
    context_length: int | None = None
    has_chat_template: bool = False
    vocab_size: int | None = None
    note: str | None = None  # "its weights were once Q4_1 …"


@dataclass(frozen=True)
class Resident:
    """A variant that is held on the device. `handle` is what unload takes."""

    handle: str
    model: str
    variant: str
    bytes: int
    device: str
    shared_bytes: int = 0  # of them: held by a variant loaded earlier too
    idle_s: float = 0.0
    node: str | None = None  # of a cluster


@dataclass(frozen=True)
class DeviceState:
    """A GPU, or a machine's CPU with its memory. Bytes; None where the machine does not say."""

    name: str
    total_bytes: int | None = None
    free_bytes: int | None = None


@dataclass(frozen=True)
class NodeState:
    """One machine of a cluster. `refused`: why nothing is placed there."""

    name: str
    devices: tuple[DeviceState, ...] = ()
    refused: str | None = None


@dataclass(frozen=True)
class EngineState:
    """What the head line of the page shows; taken without waiting for the device."""

    device: str
    total_bytes: int | None
    free_bytes: int | None
    budget_bytes: int | None = None
    waiting: int = 0
    busy: bool = False
    ready: bool = False  # torch and transformers are imported
    residents: tuple[Resident, ...] = ()
    nodes: tuple[NodeState, ...] = ()  # of a cluster
    problem: ErrorInfo | None = None  # why the cluster cannot be used now
