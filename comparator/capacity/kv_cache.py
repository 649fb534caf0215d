"""Bytes of a model's KV cache by context length, asked of transformers itself.

The model is built from its config on torch's meta device, which has shapes and no memory, and two short passes fill the
cache that transformers makes for it. So grouped queries, sliding windows, MLA's latent vectors, layers that share their
cache, linear attention and state-space layers count as they are held here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from comparator.sources import Checkpoint
from comparator.util.compat import transformers as compat

_PROBE = (2, 3)  # tokens of the two passes: shorter than any window
_LONGEST = 2**40


@dataclass(frozen=True)
class LayerCache:
    """One layer's cache of one sequence: `fixed_bytes` whatever its length (states of linear attention, convolutions), and
    `token_bytes` for each token, of the last `window` tokens at most (None: of all)."""

    token_bytes: int
    window: int | None = None
    fixed_bytes: int = 0

    def bytes(self, tokens: int) -> int:
        return self.fixed_bytes + self.token_bytes * min(tokens, self.window or tokens)


@dataclass(frozen=True)
class Geometry:
    """The cache of one sequence. `exact`: asked of transformers; else counted from the config as full attention."""

    layers: tuple[LayerCache, ...]
    exact: bool = True

    def bytes(self, tokens: int) -> int:
        """Of a sequence of which this many tokens were fed: the last token that is generated is not."""
        return sum(layer.bytes(tokens) for layer in self.layers)

    @property
    def token_bytes(self) -> int:
        """What each further token takes once all windows are full."""
        return self.bytes(_LONGEST + 1) - self.bytes(_LONGEST)

    def words(self) -> str:
        """What kinds of layers there are: "24 full attention, 24 sliding window of 4,096"."""
        counts: dict[str, int] = {}
        for layer in self.layers:
            if not layer.token_bytes:
                kind = "fixed state" if layer.fixed_bytes else "no cache"
            else:
                kind = f"sliding window of {layer.window:,}" if layer.window else "full attention"
                kind += " and fixed state" if layer.fixed_bytes else ""
            counts[kind] = counts.get(kind, 0) + 1
        return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def geometry(checkpoint: Checkpoint, dtype: str = "bf16") -> Geometry:
    """The cache of `checkpoint`'s model with activations in `dtype` ("bf16", "fp32" …). Loads no weights."""
    text = (checkpoint.path / "config.json").read_text(encoding="utf-8")
    return _geometry(checkpoint.path, text, dtype)


@lru_cache(maxsize=64)
def _geometry(folder: Path, text: str, dtype: str) -> Geometry:
    """`text`: of config.json in the folder, which may change."""
    from comparator.backends.sizes import FLOAT_BYTES

    try:
        return Geometry(tuple(_asked(folder, dtype)))
    except Exception:  # whatever a model's own code does with shapes alone
        return Geometry(tuple(_counted(json.loads(text), FLOAT_BYTES.get(dtype, 2))), exact=False)


def _asked(folder: Path, dtype: str) -> Iterator[LayerCache]:
    """By two passes through a model without memory. Raises whatever its code raises."""
    import torch

    from comparator.backends.dtypes import torch_dtype

    config = _config(folder)
    with torch.device("meta"):
        model = _model(config).to(torch_dtype(dtype)).eval()
    short, long = (_filled(model, tokens) for tokens in _PROBE)
    for one, other in zip(short, long, strict=True):
        before, after = _bytes(one), _bytes(other)
        token_bytes = (after - before) // (_PROBE[1] - _PROBE[0])
        # A sliding layer keeps one token less than its window: the next one completes it.
        window = getattr(other, "sliding_window", None)
        yield LayerCache(token_bytes, window - 1 if window else None, before - token_bytes * _PROBE[0])


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    vars(config).pop("quantization_config", None)
    for part in {id(c): c for c in (config, config.get_text_config(decoder=True))}.values():
        compat.use_batched_experts(part)
    return config


def _model(config: Any) -> Any:
    kind = compat.causal_class(config)
    return kind(config.get_text_config(decoder=True) if _is_text_class(kind, config) else config)


def _is_text_class(kind: Any, config: Any) -> bool:
    return isinstance(config.get_text_config(decoder=True), kind.config_class) and not isinstance(
        config, kind.config_class
    )


def _filled(model: Any, tokens: int) -> list[Any]:
    """The cache's layers after a pass over `tokens` tokens."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    given = torch.zeros((1, tokens), dtype=torch.long, device="meta")
    with torch.inference_mode():
        model(input_ids=given, past_key_values=cache, use_cache=True)
    return cache.layers


def _bytes(layer: Any) -> int:
    """Of every tensor that a layer's cache holds, in lists and dicts too."""
    import torch

    total, stack = 0, list(vars(layer).values())
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.element_size() if item.dim() else 0
        elif isinstance(item, dict):
            stack.extend(item.values())
        elif isinstance(item, list | tuple):
            stack.extend(item)
    return total


def _counted(values: dict[str, Any], width: int) -> Iterator[LayerCache]:
    """Full attention in every layer, by the names that most configs have."""
    text = values.get("text_config") or values
    layers = text.get("num_hidden_layers") or text.get("n_layer") or text.get("n_layers") or 1
    heads = text.get("num_attention_heads") or text.get("n_head") or text.get("n_heads") or 1
    hidden = text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or 1024
    size = text.get("head_dim") or hidden // heads
    yield from [LayerCache(2 * (text.get("num_key_value_heads") or heads) * size * width)] * layers
