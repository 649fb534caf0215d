"""The tensors of a GGUF file as layer rows, under the names that the checkpoint's modules have."""

from __future__ import annotations

import math

from comparator.backends.gguf import quantized_types, write
from comparator.core.result import LayerRow
from comparator.sources import Checkpoint
from comparator.sources.gguf_header import GgufHeader, GgufTensor

_PLAIN = {"F32": "fp32", "F16": "fp16", "BF16": "bf16", "F64": "fp64"}


def rows(header: GgufHeader, checkpoint: Checkpoint, device: str) -> list[LayerRow]:
    """One per tensor of the file, and one for a head that shares the embedding's weights."""
    names = names_of(header, checkpoint)
    table = [_row(tensor, names.get(tensor.name, tensor.name), device) for tensor in header.tensors]
    stored = {row.name: row for row in table}
    embedding = stored.get(names.get("token_embd.weight", ""))
    if checkpoint.tied and embedding is not None and "output.weight" not in header.types:
        table.append(
            LayerRow(
                **{
                    **vars(embedding),
                    "name": "lm_head.weight",
                    "parameters": 0,
                    "bytes": 0,
                    "bits_per_weight": None,
                    "tied_to": embedding.name,
                }
            )  # fmt: skip
        )
    return table


def names_of(header: GgufHeader, checkpoint: Checkpoint) -> dict[str, str]:
    """GGUF's name of a tensor → the checkpoint's."""
    names = write.gguf_names(header.architecture, int(header.of_model("block_count") or 0), checkpoint)
    return {theirs: ours for ours, theirs in names.items()}


def _row(tensor: GgufTensor, name: str, device: str) -> LayerRow:
    plain, count = _PLAIN.get(tensor.type), math.prod(tensor.shape)
    quantized = quantized_types().get(tensor.type)
    rows_of = count // tensor.shape[-1]
    return LayerRow(
        name=name,
        module_class="ggml tensor",
        param_class=tensor.type,
        storage_dtype=plain or "uint8",
        logical_dtype=plain or tensor.type.lower(),
        compute_dtype="int8" if quantized else "fp32",
        shape=tensor.shape,
        storage_shape=tensor.shape if plain else (rows_of, tensor.bytes // rows_of),
        parameters=count,
        bytes=tensor.bytes,
        quant_state_bytes=0,
        bits_per_weight=8 * tensor.bytes / count,
        device=device,
    )
