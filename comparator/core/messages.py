"""What engines and runtimes are asked and what they answer: plain dataclasses that pickle."""

from __future__ import annotations

from dataclasses import dataclass

from comparator.core.result import AdapterInfo, Environment, Latency, Memory, ModelInfo, Thinking
from comparator.core.variant import Adapter, Variant


@dataclass(frozen=True)
class LoadRequest:
    """Make a variant of a model resident, fitted with an adapter.

    Attributes:
        max_memory: {GPU number or "cpu": bytes} to spread the weights within; None: one device.
        evict: whether the least recently used may be unloaded to free memory.
        keep: handles that are still needed; they are evicted last.
        prefer_own_device: on a device where nothing else is resident, where the engine has several and one is free.
    """

    model: str
    variant: Variant
    adapter: Adapter | None = None
    max_memory: dict[int | str, int] | None = None
    evict: bool = True
    keep: frozenset[str] = frozenset()
    prefer_own_device: bool = False


@dataclass(frozen=True)
class Loaded:
    """A resident variant. `load_s` is None where it was resident already."""

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
    """Token ids of the request's prompt, the same for every column; none of them where a server shall make its own of the
    messages."""

    token_ids: tuple[int, ...]
    chat: bool
    opened: str = ""  # the thinking tag that the chat template printed at the end
    # The same before it was tokenized, for a server that takes no token ids: the text with the template's own tokens in
    # it, and the (role, content) of each message.
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Generation:
    """One run of one column. What a runtime does not measure stays None; `text` is filled in by the engine where the
    runtime has none of its own."""

    token_ids: tuple[int, ...]
    finish_reason: str | None  # "eos", "length" or "stopped"
    latency: Latency
    decode_path: str | None = None
    prepare_s: float | None = None
    run_peak_bytes: int | None = None
    kv_cache_bytes: int | None = None
    joules_per_token: float | None = None
    adapter_switch_s: float | None = None
    notes: tuple[str, ...] = ()
    text: str = ""
    thinking: Thinking | None = None  # filled in by the engine too
