"""Does config.json fit the tensors? Answered from the headers, before anything is built or allocated by its numbers.

`examine` asks the rest: whether every weight that the model needs is there. It builds the model without memory, and must
not do so by numbers that nothing bears out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from comparator.core.errors import UserError
from comparator.sources import packed
from comparator.sources.checkpoint import TensorInfo

_LAYER = re.compile(r"^(.*?)\.(\d+)\.")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_COUNT = re.compile(
    r"^(?:num|n)_(?!positions|ctx)|_layers?$|^(?:vocab|hidden|intermediate|ffn|embed\w*|d)_(?:size|dim|model)$"
)
_STEM = re.compile(r"\.(?:qweight|weight_packed|weight_scale_inv|weight_scale|SCB|weight|\w+)$")


def check(
    source: str, config: dict[str, Any], quantization: dict[str, Any] | None, tensors: list[TensorInfo]
) -> None:
    """Raises `UserError` where config.json and the tensors cannot belong together, naming both."""
    _check_numbers(source, config, tensors)
    if quantization is None:
        _check_unquantized(source, tensors)
    elif (own := packed.packing(quantization)) and not any(
        re.search(own.packed, t.name) or _is_packed(t.dtype) for t in tensors
    ):
        wanted = own.ends[0].lstrip(".") or "packed weights or scales"
        dtypes = ", ".join(sorted({t.dtype for t in tensors if t.name.endswith(".weight")}))
        raise UserError(
            f"config.json of {source} says that it is quantized ({packed.method_of(quantization)}), but its weights are "
            f"not: the files contain plain {dtypes} and no {wanted}.",
            "Remove quantization_config from config.json where the weights are full precision, or download the quantized "
            "checkpoint again.",
        )


def _check_unquantized(source: str, tensors: list[TensorInfo]) -> None:
    found = [t for t in tensors if packed.looks_packed(t.name)] or [
        t for t in tensors if t.name.endswith(".weight") and len(t.shape) > 1 and _is_packed(t.dtype)
    ]
    if found:
        kinds = sorted({_STEM.search(t.name)[0][1:] for t in found if _STEM.search(t.name)})
        raise UserError(
            f"{source} contains quantized weights ({len(found)} tensors {', '.join(kinds[:4])}; {found[0].name} is "
            f"{found[0].dtype}), but its config.json has no quantization_config.",
            "Use the config.json of the checkpoint that the weights come from. Without it the model produces noise.",
        )


def _is_packed(dtype: str) -> bool:
    return dtype.startswith(("fp8", "fp4", "fp6", "int", "uint"))


def _check_numbers(source: str, config: dict[str, Any], tensors: list[TensorInfo]) -> None:
    """Counts and sizes have bounds: what is in the files, with room for packed weights and unusual architectures."""
    largest = max((n for t in tensors for n in t.shape), default=0)
    most = 16 * max(largest, len(tensors), 4096)
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        for key, value in part.items():
            if _COUNT.search(key) and isinstance(value, int | float) and not -1 <= value <= most:
                raise UserError(
                    f"config.json of {source} says {key}={str(value)[:40]}; the largest dimension in its files is "
                    f"{largest:,}.",
                    "The files do not belong together: download the whole checkpoint again.",
                )
    promised, there = layers(config), layers_of(t.name for t in tensors)
    if promised and there and promised > 4 * there + 64:
        raise UserError(
            f"config.json of {source} says {promised:,} layers, but its files contain {there:,}: the weights of the "
            "others are missing.",
            "The files do not belong together: download the whole checkpoint again.",
        )


def layers(config: dict[str, Any]) -> int | None:
    text = config.get("text_config")
    parts = [text, config] if isinstance(text, dict) else [config]
    return next((n for p in parts for k in _LAYERS if isinstance(n := p.get(k), int)), None)


def layers_of(names: Iterable[str]) -> int:
    """How many numbered layers there are in the longest list of modules."""
    highest: dict[str, int] = {}
    for name in names:
        if found := _LAYER.match(name):
            highest[found[1]] = max(highest.get(found[1], 0), int(found[2]) + 1)
    return max(highest.values(), default=0)
