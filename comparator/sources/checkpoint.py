"""What a source gives: a local folder that transformers loads, and what its headers say. Plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparator.core.state import ModelFacts

Progress = Callable[
    [float | None, str], None
]  # fraction 0..1 or None, and what is being done; may raise Stopped

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates",
    "vocab.*", "merges.txt", "*.model", "*.tiktoken", "spiece*", "tekken.json",
)  # fmt: skip


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor as its safetensors header describes it. `dtype` is ours: "bf16", "uint8"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameters: int  # stored elements
    bytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A model on this machine's disk: `path` holds config.json, safetensors and the tokenizer.

    `parameters` are the model's own: a tied head counts once, buffers and scales do not count, and values
    packed by a quantizer are counted unpacked. `quantization` is what config.json (or AutoGPTQ's
    quantize_config.json) says about how the weights were quantized; None for a full-precision checkpoint.
    """

    source: str
    path: Path
    architecture: str
    parameters: int
    dtype: str
    revision: str | None = None
    context_length: int | None = None
    has_chat_template: bool = False
    vocab_size: int | None = None
    tied: bool = False
    note: str | None = None
    tensors: tuple[TensorInfo, ...] = ()
    model_type: str = ""
    quantization: dict[str, Any] | None = field(default=None, hash=False)
    base_model: str | None = None
    lent: Any = field(
        default=None, hash=False, compare=False
    )  # comparator.runtimes.transformers.weight_sharing.Lent: its tensors, in memory

    @property
    def identity(self) -> tuple:
        """Differs for another checkpoint under the same name: a folder that was written again is another model."""
        stats = ((f.name, f.stat()) for f in sorted(self.path.glob("*.safetensors")))
        return (str(self.path), self.revision, tuple((name, s.st_size, s.st_mtime_ns) for name, s in stats))

    def is_tied_head(self, name: str) -> bool:
        """Whether a tensor is an output head whose weights are the embedding's: stored in some files, and not held twice."""
        return self.tied and name == "lm_head.weight"

    def facts(self) -> ModelFacts:
        return ModelFacts(
            source=self.source,
            revision=self.revision,
            architecture=self.architecture,
            parameters=self.parameters,
            dtype=self.dtype,
            context_length=self.context_length,
            has_chat_template=self.has_chat_template,
            vocab_size=self.vocab_size,
            note=self.note,
            quantization=self.quantization,
            base_model=self.base_model,
        )
