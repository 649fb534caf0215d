"""The key-value cache of one model: transformers' own, in the dtype of its activations or quantized (`kv=int8`, `kv=int4`).

A quantized one is transformers' QuantizedCache with HQQ's rounding, in groups of one head's values of one token. A pass
sees its own keys and values exactly, and those before it as they are stored. The newest tokens, up to 127, stay in the
activations' dtype until they are quantized together with all before them.
"""

from __future__ import annotations

from typing import Any

from comparator.core.errors import UserError
from comparator.util.compat.transformers import quantized_cache, takes_dynamic_cache

BITS = {"int8": 8, "int4": 4}
GROUPS = (64, 16)  # values with one scale; the first that divides a head's size
CHUNK = 64  # tokens of a text that are read in one pass, where it is read through a quantized cache


def quantize(model: Any, kind: str) -> str:
    """Have `new_cache` give quantized caches of this model. Returns a note for the column. Raises `UserError`."""
    model.quantized_cache_bits = BITS[kind]
    try:
        if not takes_dynamic_cache(model):
            raise ValueError("this architecture has its own kind of cache")
        new_cache(model)
    except (ValueError, TypeError) as problem:
        del model.quantized_cache_bits
        raise UserError(
            f"kv={kind} is not possible with this model: {problem}", "Leave kv out: the cache is 16-bit then."
        ) from None
    return (
        f"KV cache in {BITS[kind]} bits (HQQ, groups of {_group(model)} values of a head): decoded eagerly, one sequence after another. "
        "The cache of the prompt is quantized after prefill; of the tokens after it, the newest (up to 127) stay in 16 bits."
    )


def is_quantized(model: Any) -> bool:
    return getattr(model, "quantized_cache_bits", None) is not None


def new_cache(model: Any) -> Any:
    """An empty cache for one run."""
    from transformers import DynamicCache

    config = model.config.get_text_config(decoder=True)
    if not is_quantized(model):
        return DynamicCache(config=config)
    return quantized_cache(config, model.quantized_cache_bits, _group(model))


def _group(model: Any) -> int:
    config = model.config.get_text_config(decoder=True)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = next((group for group in GROUPS if size % group == 0), None)
    if group is None:
        raise ValueError(f"its heads have {size} values, which groups of {GROUPS[-1]} do not divide.")
    return group
