"""Which whole tensors of an adapter's file are the model's own, value for value.

peft saves the embedding beside an adapter that targets it or the head, changed or not. Where it is not changed,
loading it would write into weights that every column shares, to no effect: such tensors are left out, and the
adapter can share the base. Compares bytes with numpy; needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from comparator.core.errors import UserError
from comparator.sources import Checkpoint
from comparator.sources.checkpoint import TensorInfo
from comparator.sources.safetensors_header import read_header
from comparator.sources.weights import Stored, read_folder

_CHUNK = 2**24  # bytes at a time


def unchanged(
    file: Path, brought: Iterable[TensorInfo], module_names: dict[str, str], checkpoint: Checkpoint
) -> set[str]:
    """The names of the `brought` tensors (of `file`) whose values are those of the checkpoint's tensor of the same
    module; `module_names` gives, per tensor, the end of the checkpoint's name."""
    wanted = list(brought)
    if not wanted:
        return set()
    try:
        stored = read_folder(checkpoint.path, checkpoint.source)
    except UserError:  # AutoGPTQ's layouts and the like: then nothing is known to be the same
        return set()
    infos, start = read_header(file)
    places, at = {}, start
    for info in infos:
        places[info.name] = Stored(info, file, at)
        at += info.bytes
    same = set()
    for tensor in wanted:
        end = module_names[tensor.name]
        twins = [s for s in stored if s.info.name == end or s.info.name.endswith("." + end)]
        if any(_equal(places[tensor.name], twin) for twin in twins):
            same.add(tensor.name)
    return same


def _equal(one: Stored, other: Stored) -> bool:
    """The same values, where both are stored alike or one is the other's bf16 written as fp32."""
    if one.info.shape != other.info.shape:
        return False
    kinds = (one.info.dtype, other.info.dtype)
    if kinds == ("fp32", "bf16"):
        return _widened(one, other)
    if kinds == ("bf16", "fp32"):
        return _widened(other, one)
    if kinds[0] != kinds[1]:
        return False
    with open(one.file, "rb") as a, open(other.file, "rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        left = one.info.bytes
        while left > 0:
            count = min(_CHUNK, left)
            if a.read(count) != b.read(count):
                return False
            left -= count
    return True


def _widened(wide: Stored, narrow: Stored) -> bool:
    """Whether every fp32 value is exactly the bf16 one: the same upper half, zeros below."""
    import numpy as np

    with open(wide.file, "rb") as a, open(narrow.file, "rb") as b:
        a.seek(wide.start)
        b.seek(narrow.start)
        left = narrow.info.parameters
        while left > 0:
            count = min(_CHUNK // 4, left)
            full = np.frombuffer(a.read(4 * count), dtype="<u4")
            half = np.frombuffer(b.read(2 * count), dtype="<u2")
            if len(full) != len(half) or not np.array_equal(full, half.astype(np.uint32) << 16):
                return False
            left -= count
    return True
