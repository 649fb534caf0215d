"""What crosses the engine's door, beside the nouns of `types`: plain dataclasses that pickle."""

from __future__ import annotations

from dataclasses import dataclass

from comparator.types import AdapterInfo, Environment, Latency, Memory, ModelInfo, Variant


@dataclass(frozen=True)
class Progress:
    """Loading, or opening a model: how far (0..1 or None) and what."""

    fraction: float | None
    message: str


@dataclass(frozen=True)
class Loaded:
    """A variant is resident. `load_s` is None where it already was."""

    handle: str
    variant: Variant
    model: ModelInfo
    kernel: str
    notes: tuple[str, ...]
    memory: Memory
    load_s: float | None
    prepare_s: float | None
    adapter: AdapterInfo | None = None
    adapter_load_s: float | None = None
    environment: Environment | None = None  # where it is not the engine's own


@dataclass(frozen=True)
class Prompt:
    """Token ids of the request's prompt, the same for every column."""

    token_ids: tuple[int, ...]
    chat: bool


@dataclass(frozen=True)
class Generation:
    """One run of one column."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None
    latency: Latency
    prepare_s: float | None
    run_peak_bytes: int | None
    kv_cache_bytes: int | None
    decode_path: str
    joules_per_token: float | None = None
    adapter_switch_s: float | None = None
    notes: tuple[str, ...] = ()
