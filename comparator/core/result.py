"""Results of a comparison: the types of the comparison document.

Plain frozen dataclasses that pickle. A field's name ends with its unit (`ttft_s`, `peak_bytes`, `decode_tok_s`); what was
not measured is `None`, never 0.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from comparator.core.prompt_set import SetResult
from comparator.core.request import BUILTIN_MODEL, GenerationSettings
from comparator.core.variant import CellName
from comparator.core.votes import Votes

SCHEMA = 2  # the newest; a document without a prompt set is written as schema 1


@dataclass(frozen=True)
class Interference:
    """What else used the machine during a run. Shares are 0 to 1. comparator/metrics/interference.py defines each."""

    disturbed: str | None = None  # why the run's times are not the variant's own; None: nothing disturbed it
    cpu_waited_share: float | None = None  # of the CPU time that this process wanted
    other_cores: float | None = None  # cores kept busy by other processes, mean over the run
    stolen_share: float | None = None  # of the time, by the host of a virtual machine
    gpu_other_share: float | None = None  # of the GPU's time, by other processes
    gpu_other_bytes: int | None = None
    gpu_clock_share: float | None = None  # mean SM clock over the highest
    gpu_throttled: tuple[str, ...] = ()


@dataclass(frozen=True)
class RunFigures:
    """Figures of one run of a column; `extra` as in `Latency`."""

    ttft_s: float | None = None
    decode_tok_s: float | None = None
    extra: dict[str, float] = field(default_factory=dict)
    interference: Interference | None = None

    @property
    def disturbed(self) -> str | None:
        return self.interference.disturbed if self.interference else None


@dataclass(frozen=True)
class Latency:
    """Times of one column over its `runs`. comparator/metrics/definitions.py defines each and how repeats combine."""

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
    adapter_load_s: float | None = None
    eager_decode_tok_s: float | None = None  # where `decode` is "both"
    floor_tok_s: float | None = None  # the roofline
    adapter_switch_s: float | None = None
    round_trip_s: float | None = None  # to a server
    extra: dict[str, float] = field(default_factory=dict)  # metrics without a field above, by their key

    @property
    def disturbed(self) -> bool:
        """Whether something else on the machine disturbed any of the runs."""
        return any(run.disturbed for run in self.runs)


@dataclass(frozen=True)
class Memory:
    """Bytes. `loaded_*`: right after loading; the rest: after the warm-up, when libraries have repacked weights."""

    loaded_weight_bytes: int | None = None
    loaded_quant_state_bytes: int | None = None
    weight_bytes: int | None = None
    quant_state_bytes: int | None = None
    adapter_bytes: int | None = None
    resident_bytes: int | None = None
    shared_bytes: int | None = None  # the part of resident_bytes in storages shared with other variants
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
    """A candidate token at a position: its text and probability."""

    token: str
    p: float


@dataclass(frozen=True)
class PromptFidelity:
    """The reference's own answer, scored by this column with its own decode path. One entry per reference token.

    Of a column that gives no full logits: `top_k` is how many log-probabilities it gives at a position, 0 for none (no
    `kl` and `p` then); `kl` is a lower bound, with all tokens that it does not name as one. `forced` False: it answered
    in its own words, which are compared up to where they first differ; the entries end there.
    """

    token_ids: tuple[int, ...] = ()
    tokens: tuple[str, ...] = ()  # their texts, for display
    kl: tuple[float, ...] = ()  # KL(reference || column), nats
    p: tuple[float | None, ...] = ()
    reference_p: tuple[float, ...] = ()
    rank: tuple[int | None, ...] = ()  # 0: this column's greedy choice is the reference's token
    first_difference: int | None = None
    top: tuple[tuple[TopToken, ...], ...] = ()
    reference_top: tuple[tuple[TopToken, ...], ...] = ()
    top_k: int | None = None  # None: full logits
    forced: bool = True

    @property
    def at_least(self) -> bool:
        """Whether `kl` is a lower bound."""
        return self.top_k is not None


@dataclass(frozen=True)
class AdapterDrift:
    """How an adapter's effect differs between this column's base and the reference's; nats, means over `tokens`
    tokens of the reference's answer. comparator/fidelity/adapter_drift.py defines it."""

    kl: float  # from the effect on the reference's base to the effect on this column's
    effect: float  # KL(reference's base with the adapter || without)
    effect_here: float  # the same on this column's base
    tokens: int


@dataclass(frozen=True)
class Fidelity:
    prompt: PromptFidelity | None = None
    text: dict[str, Any] | None = None  # comparator/fidelity/divergence.py documents the keys
    refused: str | None = None  # why fidelity could not be measured for this column
    adapter: AdapterDrift | None = None  # columns with an adapter, except the reference


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a weight's quant state (absmax, codebook, scales …)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


@dataclass(frozen=True)
class LoadedLayer:
    """A layer right after loading, if the first use changed its storage."""

    storage_dtype: str
    storage_shape: tuple[int, ...]
    bytes: int
    quant_state_bytes: int


@dataclass(frozen=True)
class LayerRow:
    """One stored tensor of the model: its storage, and the logical tensor that it represents."""

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
    """Why something failed. `error_id`: the entry in the error log of the installation where it failed."""

    problem: str
    advice: str = ""
    error_id: str | None = None


@dataclass(frozen=True)
class AdapterInfo:
    """A column's adapter. `revision` is a commit; `parameters` are the adapter's alone."""

    source: str
    revision: str | None = None
    kind: str | None = None  # "LoRA", "DoRA", "rsLoRA", "IA³" …
    base_model: str | None = None  # the model that it was trained on, from its config
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
    host: str | None = None  # the node's name in its cluster


@dataclass(frozen=True)
class Thinking:
    """The part of an answer that a model puts between thinking tags, which are counted in. The rest is the answer proper."""

    tokens: int
    characters: int  # of `text`
    opened: str = ""  # the opening tag, where the chat template had printed it already


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
    thinking: Thinking | None = None
    environment: Environment | None = None  # None: the comparison's, which all columns share

    @property
    def shown_text(self) -> str:
        """The text, after the thinking tag that the chat template had printed before it."""
        return (self.thinking.opened if self.thinking else "") + self.text

    @property
    def label(self) -> str:
        return self.variant + (f" + {self.adapter}" if self.adapter else "")


@dataclass(frozen=True)
class PromptInfo:
    text: str
    system: str | None = None
    chat: bool = False
    token_count: int | None = None
    template: str | None = None  # one of several chat templates, by its name
    template_vars: dict[str, str | int | float | bool | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """The comparison document: schema 2 with a prompt set, 1 without. `comparator.document` converts it to and from JSON."""

    id: str
    created_at: str  # UTC, ISO 8601
    prompt: PromptInfo
    settings: GenerationSettings
    environment: Environment
    model: str = BUILTIN_MODEL
    reference: CellName | None = None
    cells: tuple[CellResult, ...] = ()
    schema: int = 1
    prompt_set: SetResult | None = None
    votes: Votes | None = None  # of a saved comparison they lie beside the document, which never changes

    @property
    def prompt_count(self) -> int:
        """How many prompts the columns answered: those of its set, or one."""
        return len(self.prompt_set.prompts) if self.prompt_set else 1

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        for part in ("prompt_set", "votes"):
            if values[part] is None:
                del values[part]
        return values

    def cell(self, variant: str, adapter: str | None = None) -> CellResult | None:
        return next((c for c in self.cells if c.variant == variant and c.adapter == adapter), None)

    @property
    def ok(self) -> bool:
        return bool(self.cells) and all(c.status == "ok" for c in self.cells)
