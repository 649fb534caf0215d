"""An engine's state: model facts, resident variants, devices, nodes. Read without waiting for a device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from comparator.core.result import ErrorInfo


@dataclass(frozen=True)
class ModelFacts:
    """Facts of a model from its config and safetensors headers, before anything is loaded."""

    source: str
    revision: str | None = None
    architecture: str | None = None
    parameters: int | None = None
    dtype: str | None = None
    context_length: int | None = None
    has_chat_template: bool = False
    vocab_size: int | None = None
    note: str | None = None  # "Converted from a 4-bit GGUF file …"
    quantization: dict[str, Any] | None = field(
        default=None, hash=False
    )  # quantization_config of config.json
    base_model: str | None = None  # of a quantized one: the model it was made from, where its files say so


@dataclass(frozen=True)
class Resident:
    """A variant that is loaded on a device. `handle` identifies it, for `unload` for example."""

    handle: str
    model: str
    variant: str
    bytes: int
    device: str
    shared_bytes: int = 0  # of `bytes`, in storages shared with a variant loaded earlier
    node: str | None = None  # of a cluster


@dataclass(frozen=True)
class DeviceState:
    """A GPU, or a machine's CPU with its memory. None: the machine does not report it."""

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
    """A snapshot for the page's status line, taken without waiting for the device."""

    device: str
    total_bytes: int | None
    free_bytes: int | None
    budget_bytes: int | None = None
    waiting: int = 0
    busy: bool = False
    ready: bool = False  # torch and transformers are imported
    gpu: bool = False  # whether the device is a GPU, so that its memory is not RAM
    residents: tuple[Resident, ...] = ()
    nodes: tuple[NodeState, ...] = ()  # of a cluster
    problem: ErrorInfo | None = None  # why the GPU or the cluster cannot be used now
