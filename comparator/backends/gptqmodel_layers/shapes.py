"""A full-precision checkpoint's headers → the layers that are packed, the group size that suits them, bytes.

Looks at names and shapes only; walk.py decides by the modules themselves, with the same rule.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from comparator.backends.sizes import TensorSize, held, plain
from comparator.core.errors import UserError
from comparator.sources import Checkpoint, packed

GROUP_SIZES = (128, 64, 32)
_IN_BLOCK = re.compile(r"\.\d+\..+\.weight$")
_NOT_LINEAR = re.compile(r"norm|embed|\.experts\.|rotary|\.conv\d?d?\.|\.router\.")


@dataclass(frozen=True)
class Layer:
    name: str
    inputs: int
    outputs: int


def layers(checkpoint: Checkpoint) -> list[Layer]:
    """Linear layers inside the transformer blocks whose sizes are multiples of 32: what can be packed."""
    found = []
    for tensor in checkpoint.tensors:
        if len(tensor.shape) != 2 or not _IN_BLOCK.search(tensor.name) or _NOT_LINEAR.search(tensor.name):
            continue
        outputs, inputs = tensor.shape
        if inputs % 32 == 0 and outputs % 32 == 0:
            found.append(Layer(tensor.name.removesuffix(".weight"), inputs, outputs))
    return found


def require_full_precision(checkpoint: Checkpoint, title: str, method: str) -> None:
    """Raises `UserError` for a checkpoint that is quantized already."""
    if checkpoint.quantization:
        how = packed.method_of(checkpoint.quantization)
        raise UserError(
            f"{checkpoint.source} is quantized already ({how}), and {title} starts from full precision.",
            f"Choose the full-precision model as the comparison's model, and this one as {method}@{checkpoint.source}.",
        )


def group_size(checkpoint: Checkpoint, wish: int | None) -> int:
    """`wish` if it divides every layer's inputs; without one the largest of 128, 64, 32 that does, else −1 (a whole
    row). Raises `UserError` naming a layer that the wish does not divide."""
    found = layers(checkpoint)
    if not found:
        raise UserError(
            f"{checkpoint.source} ({checkpoint.architecture}) has no linear layer that can be packed.",
            "Its layers must have sizes in multiples of 32 and be part of a stack of blocks; use nf4 or int8.",
        )
    fitting = [g for g in GROUP_SIZES if all(layer.inputs % g == 0 for layer in found)]
    if wish is None:
        return fitting[0] if fitting else -1
    if wish > 0 and (odd := next((layer for layer in found if layer.inputs % wish), None)):
        possible = ", ".join(f"g{g}" for g in (*fitting, -1))
        raise UserError(
            f"The group size {wish} does not divide the {odd.inputs} inputs of {odd.name}.",
            f"Possible for {checkpoint.source}: {possible}. Omit it to use the largest.",
        )
    return wish


def packed_sizes(checkpoint: Checkpoint, bits: int, group: int, g_idx: bool = False) -> Iterator[TensorSize]:
    """The tensors of the quantized checkpoint: packed weights, scales and zeros per group, the rest in 16 bits, and with
    `g_idx` the group of each input."""
    names = {f"{layer.name}.weight": layer for layer in layers(checkpoint)}
    for tensor in held(checkpoint):
        if (layer := names.get(tensor.name)) is None:
            yield plain(tensor, 2)
            continue
        scales = (layer.inputs // group if group > 0 else 1) * layer.outputs
        yield TensorSize(f"{layer.name}.qweight", layer.inputs * layer.outputs * bits // 8)
        yield TensorSize(f"{layer.name}.scales", 0, 2 * scales)
        yield TensorSize(f"{layer.name}.qzeros", 0, scales * bits // 8)
        if g_idx:
            yield TensorSize(f"{layer.name}.g_idx", 0, 4 * layer.inputs)
