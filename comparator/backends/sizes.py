"""How many bytes each tensor of a loaded variant takes, from headers alone: what the pool refuses by, and the planner adds up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from comparator.sources import Checkpoint, TensorInfo, packed
from comparator.sources.counting import is_buffer, is_head

FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class TensorSize:
    """One tensor on its device, in bytes. `name` is the checkpoint's.

    `state_bytes`: what unpacking needs beside the values (scales, zero points, codebooks). `copy_bytes`: a second copy in
    a kernel's own layout, where a library keeps both.
    """

    name: str
    weight_bytes: int
    state_bytes: int = 0
    copy_bytes: int = 0

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.state_bytes + self.copy_bytes


def held(checkpoint: Checkpoint) -> Iterator[TensorInfo]:
    """The tensors that a loaded model holds: no buffers of older files, and no output head that is the embedding again."""
    shapes: dict[tuple[int, ...], int] = {}
    for tensor in checkpoint.tensors:
        shapes[tensor.shape] = shapes.get(tensor.shape, 0) + 1
    for tensor in checkpoint.tensors:
        second_head = checkpoint.tied and is_head(tensor.name) and shapes[tensor.shape] > 1
        if not second_head and not is_buffer(tensor):
            yield tensor


def plain(tensor: TensorInfo, width: int) -> TensorSize:
    """An unquantized tensor, in `width` bytes per value."""
    return TensorSize(tensor.name, tensor.parameters * width)


def as_stored(checkpoint: Checkpoint) -> list[TensorSize]:
    """Every tensor with the bytes that it has in its file, as a quantized checkpoint is held by what keeps it packed."""
    return [
        TensorSize(t.name, 0, t.bytes)
        if packed.is_state(t.name, checkpoint.quantization)
        else TensorSize(t.name, t.bytes)
        for t in held(checkpoint)
    ]


def unpacked(checkpoint: Checkpoint, width: int) -> list[TensorSize]:
    """A quantized checkpoint with every value in `width` bytes, and without what lies beside the packed weights."""
    names = {t.name for t in checkpoint.tensors}
    return [
        TensorSize(
            t.name, width * round(t.parameters * packed.values_per_element(t, names, checkpoint.quantization))
        )
        for t in held(checkpoint)
        if not packed.is_state(t.name, checkpoint.quantization)
    ]
