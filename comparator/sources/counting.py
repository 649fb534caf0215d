"""Stored tensors → what the model has: parameters, dtype, tied or not, vocabulary. Headers only.

Buffers do not count, a tied head counts once, and what a quantizer packed counts unpacked.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from comparator.sources.weights import Stored, equal

# An output head lies near the root of the model, so never inside a numbered layer.
_HEAD = re.compile(
    r"^(?:[A-Za-z_]+\.){0,2}(?:lm_head|embed_out|output|output_layer|lm_head\.decoder)\.weight$"
)
_FLOATS = {"fp64", "fp32", "fp16", "bf16"}

# Buffers that older transformers wrote beside the parameters: rotary tables, attention masks.
_BUFFER = re.compile(r"(?:rotary_emb\.|rotary_pos_emb\.)?(?:inv_freq|cos_cached|sin_cached)$|\.masked_bias$")
_MASK = re.compile(r"\.(?:attn|attention|self_attn|self_attention)\.bias$")  # (1, 1, n, n), unlike a bias
# What lies beside a packed weight: GPTQ and AWQ, bitsandbytes, fp8, compressed-tensors.
_STATE = re.compile(
    r"\.(?:qzeros|scales|g_idx|perm|SCB|weight_format|weight_scale|weight_scale_inv|weight_scale_2|input_scale|"
    r"weight_zero_point|weight_shape|weight_g_idx|weight\.absmax|weight\.quant_map|weight\.nested_absmax|"
    r"weight\.nested_quant_map|weight\.quant_state\.\w+)$|_scales$|_scale_inv$"
)
# Parts of a model of text and images that are not loaded with its text part.
_OTHER_SENSES = re.compile(r"(?:^|\.)(?:visual|vision_tower|vision_model|vision_encoder|multi_modal_projector|"
                           r"mm_projector|audio_tower|audio_model|mtp)\.")  # fmt: skip


def parameters(stored: list[Stored], second_head: Stored | None, quantization: dict | None) -> int:
    """Logical parameters of the model as it is loaded; `second_head` is stored, but tied."""
    bits = _bits(quantization)
    names = {s.info.name for s in stored}
    total = 0
    for tensor in stored:
        info = tensor.info
        if tensor is second_head or is_buffer(info) or is_state(info.name):
            continue
        total += round(info.parameters * _packed(info, names, bits))
    return total


def _packed(info: Any, names: set[str], bits: int | None) -> float:
    """Logical values in one stored element."""
    if info.name.endswith((".qweight", ".weight_packed")):
        return 8 * info.bytes / max(1, info.parameters) / (bits or 4)
    if info.dtype == "uint8" and any(
        f"{info.name}.quant_state.bitsandbytes__{m}" in names for m in ("nf4", "fp4")
    ):
        return 2
    if info.dtype == "uint8" and info.name.endswith("_blocks"):  # MXFP4 keeps two values in a byte
        return 2
    return 1


def is_state(name: str) -> bool:
    """Whether a tensor lies beside a packed weight: scales, zero points, codebooks."""
    return bool(_STATE.search(name))


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
        if not is_buffer(tensor.info) and not is_state(tensor.info.name):
            counts[tensor.info.dtype] += tensor.info.bytes
    floats = {name: n for name, n in counts.items() if name in _FLOATS}
    return max(floats or counts, key=lambda name: counts[name]) if counts else "?"


def tied(config: dict[str, Any], stored: list[Stored]) -> tuple[bool, Stored | None]:
    """(whether head and embedding are one tensor, the head where it is stored a second time).

    `tie_word_embeddings` is true where a config leaves it out, and transformers ties two stored tensors only if
    they are equal.
    """
    if not tie_flag(config):
        return False, None
    head = next((s for s in stored if _HEAD.match(s.info.name)), None)
    if head is None:
        return True, None
    alike = [
        s for s in stored if s is not head and s.info.shape == head.info.shape and len(s.info.shape) == 2
    ]
    if not alike:  # the one that is stored goes by the head's name
        return True, None
    twin = any(equal(head, other) for other in alike)
    return twin, head if twin else None


def tie_flag(config: dict[str, Any]) -> bool:
    text = config.get("text_config") if isinstance(config.get("text_config"), dict) else {}
    value = config.get("tie_word_embeddings", text.get("tie_word_embeddings", True))
    return True if value is None else bool(value)


def _bits(quantization: dict | None) -> int | None:
    for key in ("bits", "w_bit", "wbits"):
        value = (quantization or {}).get(key)
        if isinstance(value, int) and 1 <= value <= 16:
            return value
    return None
