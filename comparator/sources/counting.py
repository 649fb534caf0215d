"""Stored tensors → what the model has: parameters, dtype, tied or not, vocabulary. Headers only.

Buffers do not count, a tied head counts once, and what a quantizer packed counts unpacked.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from comparator.sources import packed
from comparator.sources.weights import Stored, equal

# An output head lies near the root of the model, so never inside a numbered layer.
_HEAD = re.compile(
    r"^(?:[A-Za-z_]+\.){0,2}(?:lm_head|embed_out|output|output_layer|lm_head\.decoder)\.weight$"
)
_FLOATS = {"fp64", "fp32", "fp16", "bf16"}

# Buffers that older transformers wrote beside the parameters: rotary tables, attention masks.
_BUFFER = re.compile(r"(?:rotary_emb\.|rotary_pos_emb\.)?(?:inv_freq|cos_cached|sin_cached)$|\.masked_bias$")
_MASK = re.compile(r"\.(?:attn|attention|self_attn|self_attention)\.bias$")  # (1, 1, n, n), unlike a bias
# Parts of a model of text and images that are not loaded with its text part.
_OTHER_SENSES = re.compile(r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder|multi_modal_projector|"
                           r"mm_projector|audio_tower|audio_model|mtp)\.")  # fmt: skip


def parameters(stored: list[Stored], second_head: Stored | None, quantization: dict | None) -> int:
    """Logical parameters of the model as it is loaded; `second_head` is stored, but tied."""
    names = {s.info.name for s in stored}
    total = 0
    for tensor in stored:
        info = tensor.info
        if tensor is second_head or is_buffer(info) or packed.is_state(info.name, quantization):
            continue
        total += round(info.parameters * packed.values_per_element(info, names, quantization))
    return total


def is_head(name: str) -> bool:
    """Whether a tensor's name is that of an output head."""
    return bool(_HEAD.match(name))


def is_other_sense(info: Any) -> bool:
    return bool(_OTHER_SENSES.search(info.name))


def is_buffer(info: Any) -> bool:
    return (
        bool(_BUFFER.search(info.name))
        or (bool(_MASK.search(info.name)) and len(info.shape) > 1)
        or (info.dtype == "bool")
    )


def dtype(stored: list[Stored]) -> str:
    """The dtype of most of the unquantized bytes; of all bytes where nothing is a plain float."""
    counts: Counter[str] = Counter()
    for tensor in stored:
        if not is_buffer(tensor.info) and not packed.is_state(tensor.info.name):
            counts[tensor.info.dtype] += tensor.info.bytes
    floats = {name: n for name, n in counts.items() if name in _FLOATS}
    return max(floats or counts, key=lambda name: counts[name]) if counts else "?"


def tied(
    config: dict[str, Any], stored: list[Stored], same: Callable[[Stored, Stored], bool] = equal
) -> tuple[bool, Stored | None]:
    """(whether head and embedding are one tensor, the head where it is stored a second time).

    `tie_word_embeddings` is true where a config leaves it out, and transformers ties two stored tensors only if
    they are equal, which `same` decides.
    """
    if not tie_flag(config):
        return False, None
    head = next((s for s in stored if is_head(s.info.name)), None)
    if head is None:
        return True, None
    alike = [
        s for s in stored if s is not head and s.info.shape == head.info.shape and len(s.info.shape) == 2
    ]
    if not alike:  # the one that is stored goes by the head's name
        return True, None
    twin = any(same(head, other) for other in alike)
    return twin, head if twin else None


def tie_flag(config: dict[str, Any]) -> bool:
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    value = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    return True if value is None else bool(value)
