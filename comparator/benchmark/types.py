"""What a benchmark is asked for and what it reports: options, one timed path, one row a variant, the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from comparator.core.result import Environment
from comparator.metrics import kernels

if TYPE_CHECKING:
    pass


PATHS = ("eager", "graph", "compiled")


OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """`prompt_tokens`, `new_tokens`: of the decode runs. `ttft_tokens`: prompt of the TTFT runs, 0 leaves them out."""

    decode: tuple[str, ...] = ("eager",)
    prompt_tokens: int = 128
    new_tokens: int = 128
    pairs: int = 3
    ttft_tokens: int = 0
    seed: int = 0
    batch: int = 1
    profile: bool = False


@dataclass
class Timed:
    """One path. Times in seconds; `runs` holds decode tok/s, `ratio` the median over pairs of ours ÷ stock."""

    path: str
    prepare_s: float | None = None
    ttft_s: float | None = None
    decode_tok_s: float | None = None
    runs: list[float] = field(default_factory=list)
    ratio: float | None = None
    floor_share: float | None = None
    joules_per_token: float | None = None
    run_peak_bytes: int | None = None
    kv_cache_bytes: int | None = None
    check: str = ""
    notes: tuple[str, ...] = ()
    error: str | None = None
    profile: kernels.StepProfile | None = None


@dataclass
class Row:
    """One variant."""

    variant: str
    kernel: str | None = None
    load_s: float | None = None
    load_peak_bytes: int | None = None
    resident_bytes: int | None = None
    footprint_bytes: int | None = None
    peak_source: str | None = None
    step_bytes: int | None = None
    floor_tok_s: float | None = None
    stock: Timed | None = None
    paths: list[Timed] = field(default_factory=list)
    ttft: dict[str, float] | None = None
    left_after_unload_bytes: int | None = None
    notes: tuple[str, ...] = ()
    error: str | None = None


@dataclass
class Report:
    model: str
    parameters: int
    options: Options
    environment: Environment
    device: str
    copy_bytes_s: float | None
    rows: list[Row] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
