"""Reads the header of a GGUF file: what it is and whether it is whole. Neither torch nor the weights are touched.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is untrusted: every length is checked.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparator.types import Problem

_FIXED = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}


@dataclass(frozen=True)
class GgufHeader:
    """`metadata` has arrays only as their length, but for short arrays of numbers."""

    architecture: str
    metadata: dict[str, Any]
    types: dict[str, str]  # tensor name → ggml type: "Q4_1", "F32"
    parameters: int
    weight_types: Counter[str] = field(hash=False)  # elements by type

    @property
    def quantization(self) -> str | None:
        """The type of most of the weights, "Q4_1"; None for a file of plain floats."""
        name = self.weight_types.most_common(1)[0][0]
        return None if name in _PLAIN else name

    @property
    def dtype(self) -> str:
        """What the converted weights are kept as: the file's own float type, bf16 for what was quantized."""
        name = self.weight_types.most_common(1)[0][0]
        return _PLAIN.get(name, "bf16")

    def of_model(self, key: str) -> Any:
        return self.metadata.get(f"{self.architecture}.{key}")


class _Short(Exception):
    pass


def read_gguf(file: Path) -> GgufHeader:
    """Raises `Problem` for what is no GGUF, is cut off, or holds types that cannot be read."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            if size < 24:
                raise _no_gguf(file)
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(file, data, size)
    except OSError as error:
        raise Problem(
            f"{file} cannot be read: {error.strerror}.", "Check its path and permissions."
        ) from None
    except _Short:
        raise _cut_off(file, size) from None
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError, RecursionError):
        raise Problem(
            f"{file.name} is damaged: its header cannot be read.", "Download or copy it again."
        ) from None


def _parse(file: Path, data: mmap.mmap, size: int) -> GgufHeader:
    if data[:4] != b"GGUF":
        raise _no_gguf(file)
    version, tensor_count, pair_count = struct.unpack_from("<IQQ", data, 4)
    if version not in (2, 3):
        raise Problem(
            f"{file.name} is GGUF version {version}; versions 2 and 3 can be read.",
            "Convert it with a current llama.cpp.",
        )
    place, metadata = 24, {}
    for _ in range(pair_count):
        key, place = _string(data, place, size)
        kind, place = _number(data, place, "<I", size)
        metadata[key], place = _value(data, place, kind, size)
    tensors = []
    for _ in range(tensor_count):
        name, place = _string(data, place, size)
        dims, place = _number(data, place, "<I", size)
        if dims > 8:
            raise struct.error
        shape = []
        for _ in range(dims):
            n, place = _number(data, place, "<Q", size)
            shape.append(n)
        kind, place = _number(data, place, "<I", size)
        offset, place = _number(data, place, "<Q", size)
        tensors.append((name, math.prod(shape), kind, offset))
    if not isinstance(metadata.get("general.architecture"), str) or not tensors:
        raise Problem(
            f"{file.name} holds no model (no architecture or no tensors).",
            "Name the GGUF file of a language model.",
        )
    return _header(file, metadata, tensors, place, size)


def _header(file: Path, metadata: dict, tensors: list, place: int, size: int) -> GgufHeader:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    except ImportError:
        raise Problem(
            "Reading GGUF files takes the gguf library, which is not installed.", "Run: pip install gguf"
        ) from None

    alignment = metadata.get("general.alignment", 32)
    start = -(-place // alignment) * alignment
    types, elements, end = {}, Counter(), start
    for name, count, kind, offset in tensors:
        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            raise Problem(
                f"{file.name} holds weights of an unknown type ({kind}).",
                "Use a common one such as Q8_0 or Q4_K_M.",
            ) from None
        block, block_bytes = GGML_QUANT_SIZES[known]
        types[name] = known.name
        if not name.startswith("rope_"):  # tables of the rotary embedding, no weights
            elements[known.name] += count
        end = max(end, start + offset + count // block * block_bytes)
    if end > size:
        raise _cut_off(file, size, end)
    return GgufHeader(metadata["general.architecture"], metadata, types, elements.total(), elements)


def _number(data: mmap.mmap, place: int, form: str, size: int) -> tuple[Any, int]:
    width = struct.calcsize(form)
    if place + width > size:
        raise _Short
    return struct.unpack_from(form, data, place)[0], place + width


def _string(data: mmap.mmap, place: int, size: int) -> tuple[str, int]:
    length, place = _number(data, place, "<Q", size)
    if place + length > size:
        raise _Short
    return data[place : place + length].decode("utf-8", errors="replace"), place + length


def _value(data: mmap.mmap, place: int, kind: int, size: int) -> tuple[Any, int]:
    if kind in _FIXED:
        return _number(data, place, _FIXED[kind], size)
    if kind == _STRING:
        return _string(data, place, size)
    if kind != _ARRAY:
        raise struct.error
    inner, place = _number(data, place, "<I", size)
    count, place = _number(data, place, "<Q", size)
    if inner in _FIXED:
        end = place + count * struct.calcsize(_FIXED[inner])
        if end > size:
            raise _Short
        short = count <= 1024
        return (list(struct.unpack_from(f"<{count}{_FIXED[inner][1]}", data, place)) if short else count), end
    if inner != _STRING:
        raise struct.error
    for _ in range(count):  # a vocabulary: walked over, its length is enough
        length, place = _number(data, place, "<Q", size)
        place += length
        if place > size:
            raise _Short
    return count, place


def _no_gguf(file: Path) -> Problem:
    return Problem(
        f"{file.name} is not a GGUF file.", "Name a .gguf file, or the folder of a safetensors checkpoint."
    )


def _cut_off(file: Path, size: int, needed: int | None = None) -> Problem:
    more = (
        f": {needed / 1e6:,.1f} MB are needed, {size / 1e6:,.1f} MB are there"
        if needed
        else " inside its header"
    )
    return Problem(f"{file.name} is cut off{more}.", "Download or copy it again; the copy was not finished.")
