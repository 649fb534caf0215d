"""Reads the header of a safetensors file: names, dtypes, shapes. Neither torch nor the weights are touched.

Format: 8 bytes with the header's length (little-endian), the header as JSON, then the data
(https://github.com/huggingface/safetensors#format). The header is untrusted: every length is checked.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

from comparator.sources.checkpoint import TensorInfo
from comparator.types import Problem

_LONGEST_HEADER = 100 * 10**6  # the limit of safetensors itself
_BITS = {
    "F64": ("fp64", 64), "F32": ("fp32", 32), "F16": ("fp16", 16), "BF16": ("bf16", 16),
    "F8_E4M3": ("fp8_e4m3", 8), "F8_E5M2": ("fp8_e5m2", 8), "F8_E8M0": ("fp8_e8m0", 8), "F4": ("fp4", 4),
    "I64": ("int64", 64), "U64": ("uint64", 64), "I32": ("int32", 32), "U32": ("uint32", 32),
    "I16": ("int16", 16), "U16": ("uint16", 16), "I8": ("int8", 8), "U8": ("uint8", 8), "BOOL": ("bool", 8),
    "C64": ("complex64", 64), "F8_E4M3FNUZ": ("fp8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("fp8_e5m2fnuz", 8),
}  # fmt: skip


def read_header(file: Path) -> tuple[list[TensorInfo], int]:
    """The tensors of one file in the order of their data, which lies without gaps from the returned offset on.

    Raises `Problem` naming a file that is damaged.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise _damaged(file, f"its header cannot be read ({size:,} bytes)")
            text = stream.read(length)
    except OSError as error:
        raise Problem(
            f"{file} cannot be read: {error.strerror}.", "Check its permissions and the disk."
        ) from None
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda e: e[1]["data_offsets"])
        return _tensors(file, entries, size - 8 - length), 8 + length
    except Problem:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _damaged(file, "its header is not valid") from None


def _tensors(file: Path, entries: list, data_bytes: int) -> list[TensorInfo]:
    found, end = [], 0
    for name, entry in entries:
        dtype, bits = _BITS.get(entry["dtype"], (str(entry["dtype"]).lower(), None))
        shape = tuple(int(n) for n in entry["shape"])
        first, last = entry["data_offsets"]
        count = math.prod(shape)
        if first != end or last < first or any(n < 0 for n in shape):
            raise _damaged(file, f"the place of {name} is wrong")
        if bits is not None and (last - first) * 8 != count * bits:
            raise _damaged(file, f"the size of {name} does not match its shape")
        end = last
        found.append(TensorInfo(name, dtype, shape, count, last - first))
    if end > data_bytes:
        raise _damaged(file, f"{end - data_bytes:,} bytes are missing at its end")
    if end < data_bytes:
        raise _damaged(file, f"it has {data_bytes - end:,} bytes too many")
    return found


def _damaged(file: Path, how: str) -> Problem:
    return Problem(f"{file.name} in {file.parent} is damaged: {how}.", "Download or copy this file again.")
