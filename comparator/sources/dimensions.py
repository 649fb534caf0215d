"""The sizes of a model's blocks, from config.json under the names that most configs have, else from the tensors' headers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from comparator.sources.checkpoint import Checkpoint

_BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Dimensions:
    """`inner`: outputs of an MLP's first layer, for a mixture of experts those of all experts that a token takes. `experts`
    and `experts_per_token`: 0 for a dense model."""

    hidden: int
    inner: int
    layers: int
    vocabulary: int
    experts: int = 0
    experts_per_token: int = 0


def dimensions(checkpoint: Checkpoint) -> Dimensions:
    config = _text_config(checkpoint)

    def first(*names: str) -> int:
        return next((v for name in names if type(v := config.get(name)) is int and v > 0), 0)

    matrices = [t.shape for t in checkpoint.tensors if len(t.shape) == 2]
    blocks = [int(match[1]) for t in checkpoint.tensors if (match := _BLOCK.search(t.name))]
    hidden = first("hidden_size", "n_embd", "d_model") or max((s[1] for s in matrices), default=1024)
    inner = first("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size") or 4 * hidden
    experts = first("num_local_experts", "num_experts", "n_routed_experts")
    taken = first("num_experts_per_tok", "moe_topk", "top_k") if experts else 0
    if experts:
        inner = (
            max(inner, taken * first("moe_intermediate_size"))
            if config.get("moe_intermediate_size")
            else inner * taken
        )
    return Dimensions(
        hidden=hidden,
        inner=inner,
        layers=first("num_hidden_layers", "n_layer", "n_layers") or 1 + max(blocks, default=0),
        vocabulary=checkpoint.vocab_size or first("vocab_size") or 32000,
        experts=experts,
        experts_per_token=taken,
    )


def _text_config(checkpoint: Checkpoint) -> dict[str, Any]:
    try:
        config = json.loads((checkpoint.path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config.get("text_config") or config
