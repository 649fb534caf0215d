"""How many bytes bitsandbytes' layers take: their weights and quant state, as stored and as a CPU with AVX-512 repacks them."""

from __future__ import annotations

import math
from collections.abc import Iterator

from comparator.backends import sizes
from comparator.backends.bnb import ready_made
from comparator.backends.sizes import TensorSize
from comparator.sources import Checkpoint, TensorInfo, packed
from comparator.util.compat import bitsandbytes as compat

BLOCK = 64  # weights that share an absmax, by default
_NESTED_BLOCK = 256  # absmax values that share one of their own, with double quantization
_CODE_BYTES = 16 * 4  # the 16 values of NF4 or FP4 in fp32
_NESTED_CODE_BYTES = 256 * 4


def quantized(name: str, shape: tuple[int, ...], method: str, nested: bool, device: str) -> TensorSize:
    """A linear layer's weight of this (out, in) shape, quantized here. nested: double quantization."""
    count = math.prod(shape)
    if method == "int8":
        return TensorSize(name, count, 4 * shape[0])
    blocks = math.ceil(count / BLOCK)
    if device == "cpu" and compat.repacks_for_cpu(*shape, BLOCK):
        state = (
            2 * blocks + _CODE_BYTES + (4 if nested else 0)
        )  # absmax in bf16; double quantization is undone
    elif nested:
        state = blocks + 4 * math.ceil(blocks / _NESTED_BLOCK) + _NESTED_CODE_BYTES + _CODE_BYTES + 4
    else:
        state = 4 * blocks + _CODE_BYTES
    return TensorSize(name, math.ceil(count / 2), state)


def of_checkpoint(
    checkpoint: Checkpoint, method: str, dtype: str | None, device: str
) -> Iterator[TensorSize]:
    """A checkpoint that bitsandbytes quantized. dtype: of what is not quantized, where that is not as it is stored."""
    layers, shapes = set(ready_made.quantized_modules(checkpoint)), {}
    if device == "cpu" and method != "int8":
        shapes = {
            name: record["shape"]
            for name, record in ready_made.layer_records(checkpoint)
            if compat.repacks_for_cpu(*record["shape"], record["blocksize"])
        }
    for tensor in sizes.held(checkpoint):
        if ready_made.RECORD in tensor.name or tensor.name.endswith(".weight_format"):
            continue
        module = tensor.name.partition(".weight")[0]
        if packed.is_state(tensor.name, checkpoint.quantization):
            yield TensorSize(tensor.name, 0, _state_bytes(tensor, module in shapes))
        elif dtype is None or tensor.name.removesuffix(".weight") in layers:
            yield TensorSize(tensor.name, tensor.bytes)
        else:
            yield sizes.plain(tensor, sizes.FLOAT_BYTES[dtype])


def _state_bytes(tensor: TensorInfo, repacked: bool) -> int:
    if not repacked or tensor.name.endswith(".quant_map"):
        return tensor.bytes
    return 2 * tensor.parameters if tensor.name.endswith(".absmax") else 0


def stays(tensor: TensorInfo, left: list[str]) -> bool:
    """Whether a checkpoint's tensor is left unquantized: what is no linear layer (embeddings, norms, experts, which
    transformers fuses into one parameter), and what is in `left`."""
    module = tensor.name.rsplit(".", 1)[0]
    # As transformers matches them: the beginning of the full name up to a module's boundary, or its end.
    if len(tensor.shape) != 2 or any(f"{module}.".startswith(f"{k}.") or module.endswith(k) for k in left):
        return True
    return ".experts." in tensor.name or "embed" in module or module.endswith(("wte", "wpe", "norm"))
