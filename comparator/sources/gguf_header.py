"""The header of a GGUF file: what it is and whether it is whole. Neither torch nor the weights are touched.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The file is untrusted: counts, lengths, dimensions and
offsets are bounded before anything is made of them. `gguf.GGUFReader` reads a file after this, in `convert_gguf`: it
trusts the counts, and makes an array of every entry of a vocabulary (6 s and 150 MB for the built-in model's header).
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from comparator.core.errors import UserError

_FIXED = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))  # GGUF's number types
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}
_PAIRS, _TENSORS, _ENTRIES, _DIMENSIONS = 10_000, 200_000, 10**7, 4  # more than any model has
_HEADER_BYTES = 512 * 2**20
_KEPT_BYTES = 2**20  # of a longer string only its length is kept


@dataclass(frozen=True)
class GgufTensor:
    """`type` is ggml's name ("Q4_1"); `shape` is in torch's order, rows of `shape[-1]` values; `bytes` as stored,
    `offset` bytes from the start of the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    bytes: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """`metadata` has arrays and very long strings only as their length, but for short arrays of numbers."""

    architecture: str
    metadata: dict[str, Any]
    types: dict[str, str]  # tensor name → ggml type: "Q4_1", "F32"
    parameters: int
    weight_types: Counter[str] = field(hash=False)  # elements by type
    tensors: tuple[GgufTensor, ...] = ()

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
    """The header goes on after the end of the file."""


class _Damaged(Exception):
    """A number in the header that no model has."""


def read_gguf(file: Path) -> GgufHeader:
    """Raises `UserError` for what is no GGUF of a language model, is cut off, or holds types that cannot be unpacked."""
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            if size < 24 or stream.read(4) != b"GGUF":
                raise UserError(
                    f"{file.name} is not a GGUF file.",
                    "Name a .gguf file, or the folder of a safetensors checkpoint.",
                )
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(file, _Cursor(data, min(size, _HEADER_BYTES)), size)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror}.", "Check its path and permissions."
        ) from None
    except _Short:
        raise _cut_off(file, " inside its header") from None
    except _Damaged as error:
        raise UserError(
            f"{file.name} is damaged: its header cannot be read ({error}).", "Download or copy it again."
        ) from None


class _Cursor:
    """A place in the header; every read is checked against its end."""

    def __init__(self, data: mmap.mmap, end: int):
        self.data, self.end, self.place = data, end, 4

    def skip(self, length: int) -> int:
        """Go past `length` bytes; returns where they start."""
        start, self.place = self.place, self.place + length
        if self.place > self.end:
            raise _Short
        return start

    def numbers(self, form: str, count: int = 1) -> tuple:
        form = f"<{count}{form}"
        return struct.unpack_from(form, self.data, self.skip(struct.calcsize(form)))

    def number(self, form: str = "Q") -> Any:
        return self.numbers(form)[0]

    def bounded(self, most: int, what: str) -> int:
        if (number := self.number()) > most:
            raise _Damaged(f"{number:,} {what}")
        return number

    def string(self) -> str | int:
        length = self.number()
        start = self.skip(length)
        if length > _KEPT_BYTES:
            return length
        return self.data[start : self.place].decode("utf-8", errors="replace")

    def value(self) -> Any:
        kind = self.number("I")
        if kind in _FIXED:
            return self.number(_FIXED[kind])
        if kind == _STRING:
            return self.string()
        inner = self.number("I") if kind == _ARRAY else None
        if inner in _FIXED:
            count = self.number()
            if count <= 1024:
                return list(self.numbers(_FIXED[inner], count))
            self.skip(count * struct.calcsize(_FIXED[inner]))
        elif inner == _STRING:
            count, place, length = (
                self.bounded(_ENTRIES, "entries in an array"),
                self.place,
                struct.Struct("<Q"),
            )
            for _ in range(count):  # a vocabulary: walked over, its length is enough
                if place + 8 > self.end:
                    raise _Short
                place += 8 + length.unpack_from(self.data, place)[0]
            self.skip(place - self.place)
        else:
            raise _Damaged("arrays in an array" if inner == _ARRAY else f"a value of type {kind}")
        return count


def _parse(file: Path, header: _Cursor, size: int) -> GgufHeader:
    if (version := header.number("I")) not in (2, 3):
        raise UserError(
            f"{file.name} is GGUF version {version}; versions 2 and 3 can be read.",
            "Convert it with a current llama.cpp.",
        )
    tensor_count, pair_count = header.bounded(_TENSORS, "tensors"), header.bounded(_PAIRS, "keys")
    metadata: dict[Any, Any] = {}
    for _ in range(pair_count):
        key = header.string()
        metadata[key] = header.value()
    tensors = []
    for _ in range(tensor_count):
        name = header.string()
        if (dimensions := header.number("I")) > _DIMENSIONS:
            raise _Damaged(f"a tensor of {dimensions:,} dimensions")
        shape = header.numbers("Q", dimensions)
        tensors.append((str(name), shape[::-1], header.number("I"), header.number()))
    _refuse_others(file, metadata, tensors)
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise _Damaged(f"an alignment of {str(alignment)[:40]}")
    return _header(file, metadata, tensors, -(-header.place // alignment) * alignment, size)


def _refuse_others(file: Path, metadata: dict, tensors: list) -> None:
    """Raises `UserError` for a GGUF that is not a whole language model, by what it is."""
    architecture, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    count, number = metadata.get("split.count"), metadata.get("split.no")
    if isinstance(count, int) and isinstance(number, int) and count > 1:
        first = re.sub(r"\d{5}(?=-of-\d{5}\.gguf$)", "00001", file.name)
        raise UserError(
            f"{file.name} is part {number + 1} of {count} of a split GGUF file; a part alone is not a model.",
            f"Join the parts with llama.cpp, and name the result: llama-gguf-split --merge {first} model.gguf",
        )
    if kind == "mmproj" or architecture == "clip":
        raise UserError(
            f"{file.name} is a vision projector (mmproj), which belongs to a language model, not a model.",
            "Name the GGUF file of the language model itself.",
        )
    if kind == "adapter":
        raise UserError(
            f"{file.name} is a LoRA adapter in GGUF, not a model.",
            "Name its base as the model, and add the adapter in peft's format (adapter_model.safetensors).",
        )
    if kind != "model" or not isinstance(architecture, str) or not tensors:
        what = "no architecture or no tensors" if kind == "model" else f"its type is {str(kind)[:40]}"
        raise UserError(f"{file.name} contains no model ({what}).", "Name the GGUF file of a language model.")


def _header(file: Path, metadata: dict, tensors: list, start: int, size: int) -> GgufHeader:
    try:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError:
        raise UserError(
            "Reading GGUF files requires the gguf library, which is not installed.", "Run: pip install gguf"
        ) from None

    import numpy

    for kind in {kind for _, _, kind, _ in tensors}:
        try:
            known = GGMLQuantizationType(kind)
            dequantize(numpy.zeros((1, GGML_QUANT_SIZES[known][1]), numpy.uint8), known)
        except (ValueError, NotImplementedError):
            named = (
                GGMLQuantizationType(kind).name if kind in list(GGMLQuantizationType) else f"number {kind}"
            )
            raise UserError(
                f"{file.name} contains weights of the type {named}, which cannot be unpacked here.",
                "Use a file of a common type such as Q8_0 or Q4_K_M.",
            ) from None
    types, elements, end, stored = {}, Counter(), start, []
    for name, shape, kind, offset in tensors:
        known, count = GGMLQuantizationType(kind), math.prod(shape)
        block, block_bytes = GGML_QUANT_SIZES[known]
        types[name] = known.name
        stored.append(GgufTensor(name, known.name, shape, count // block * block_bytes, start + offset))
        if not name.startswith("rope_"):  # tables of the rotary embedding, no weights
            elements[known.name] += count
        end = max(end, stored[-1].offset + stored[-1].bytes)
    if end > size:
        raise _cut_off(file, f": {end / 1e6:,.1f} MB are needed, it has {size / 1e6:,.1f} MB")
    return GgufHeader(
        metadata["general.architecture"], metadata, types, elements.total(), elements, tuple(stored)
    )


def _cut_off(file: Path, how: str) -> UserError:
    return UserError(f"{file.name} is truncated{how}.", "Download or copy it again; the copy is incomplete.")
