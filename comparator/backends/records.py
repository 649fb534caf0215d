"""What a backend takes and returns, as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

DTYPES = ("fp32", "fp16", "bf16")
Progress = Callable[
    [float | None, str], None
]  # fraction 0..1 or None, and what is being done; may raise Stopped


@dataclass(frozen=True)
class Placement:
    """Where a variant goes: one device, or accelerate's limits per device (`max_memory`, bytes)."""

    device: str = "cpu"
    max_memory: dict[int | str, int] | None = None


@dataclass
class LoadedModel:
    """What `load` returns: the model in eval mode on its device, `kernel` (what multiplies the weights: library and
    class name), and notes for the reader of the column."""

    model: Any
    kernel: str
    notes: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Logical:
    """A packed tensor's meaning: its dtype by name ("nf4"), its shape, and the dtype it is multiplied in."""

    dtype: str
    shape: tuple[int, ...]
    compute_dtype: str


@dataclass(frozen=True)
class QuantizedType:
    """A quantized dtype that `Logical.dtype` may name, and how the page describes it.

    `words`: how the values are stored, as a phrase ("8-bit integers, one scale per row"). None: the page says how many
    values of `bits` bits lie in each element of the storage.
    """

    name: str
    bits: int
    words: str | None = None


@dataclass(frozen=True)
class AdapterKind:
    """What `check_adapter` decides by. `kind` is for people ("LoHa"), `peft_type` is peft's name ("LOHA"), `merged`
    asks for the update to be added to the weights."""

    source: str
    kind: str
    peft_type: str
    dora: bool = False
    merged: bool = False


@dataclass(frozen=True)
class Training:
    """How a LoRA is trained on a variant; the estimate of its memory follows from it.

    `quantized`: peft's `prepare_model_for_kbit_training` is applied, and the optimizer `auto` is the paged 8-bit one
    on CUDA. `dtype`: of what is not quantized, before that. `adapter_width`: bytes of an adapter's parameter as trl
    keeps it. `activation_width`: bytes of an activation. `upcast`: peft's preparation turns everything that is not
    quantized to fp32, and the backward pass unpacks a layer's weight. `unpacked_width`: bytes per weight of linear layers
    that autograd keeps from the forward to the backward pass, where the forward unpacks the weight in plain operations.
    """

    dtype: str
    quantized: bool = True
    adapter_width: int = 4
    activation_width: int = 2
    upcast: bool = False
    unpacked_width: int = 0
