"""The header of a safetensors file: names, dtypes, shapes. Neither torch nor the weights are touched.

safetensors itself checks the untrusted header, in Rust and without big integers: its length, every number, that sizes
match shapes, and that the tensors cover the file's data without gaps.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

from comparator.core.errors import UserError
from comparator.sources.checkpoint import TensorInfo

MOST_BYTES = 16_000_000  # of a header; 60,000 tensors of a mixture of experts have some 8 MB
_MOST_KEPT_BYTES = 1_000_000  # a header in memory is several times as large
_MOST_DIMENSIONS = 16  # more than any weight has
_NAMES = {  # safetensors' names → ours and bits; the rest are signed and unsigned integers, I32, U8
    "F64": ("fp64", 64), "F32": ("fp32", 32), "F16": ("fp16", 16), "BF16": ("bf16", 16), "F4": ("fp4", 4),
    "F8_E4M3": ("fp8_e4m3", 8), "F8_E5M2": ("fp8_e5m2", 8), "F8_E8M0": ("fp8_e8m0", 8), "BOOL": ("bool", 8),
    "F8_E4M3FNUZ": ("fp8_e4m3fnuz", 8), "F8_E5M2FNUZ": ("fp8_e5m2fnuz", 8), "C64": ("complex64", 64),
    "F6_E2M3": ("fp6_e2m3", 6), "F6_E3M2": ("fp6_e3m2", 6),
}  # fmt: skip


def read_header(file: Path) -> tuple[list[TensorInfo], int]:
    """The tensors of one file in the order of their data, which lies without gaps from the returned offset on.

    A file is read once for as long as it does not change, unless its header is large. Raises `UserError` naming a file that
    is damaged.
    """
    from safetensors import SafetensorError

    try:
        stat = file.stat()
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
        if MOST_BYTES < length < stat.st_size:
            raise _damaged(file, f"its header has {length / 1e6:,.0f} MB")
        read = _read if length <= _MOST_KEPT_BYTES else _read.__wrapped__
        return list(read(file, stat.st_size, stat.st_mtime_ns, stat.st_ino)), 8 + length
    except SafetensorError as error:
        how = str(error).removeprefix("Error while deserializing header: ")
        if "not fully covered" in how:
            how = f"it is truncated, or longer than its header says ({file.stat().st_size:,} bytes)"
        raise _damaged(file, how) from None
    except OSError as error:
        raise UserError(
            f"{file} cannot be read: {error.strerror or error}.", "Check its permissions and the disk."
        ) from None


@lru_cache(maxsize=256)  # files of a few models; a model of 8B shapes has some 300 tensors
def _read(file: Path, _size: int, _changed: int, _inode: int) -> tuple[TensorInfo, ...]:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as header:
        slices = [(name, header.get_slice(name)) for name in header.offset_keys()]
        return tuple(_tensor(file, name, s.get_dtype(), s.get_shape()) for name, s in slices)


def _tensor(file: Path, name: str, dtype: str, shape: list[int]) -> TensorInfo:
    if len(shape) > _MOST_DIMENSIONS:
        raise _damaged(file, f"{name[:100]} has {len(shape):,} dimensions")
    ours, bits = _NAMES.get(dtype) or (dtype.replace("I", "int").replace("U", "uint").lower(), int(dtype[1:]))
    count = math.prod(shape)
    return TensorInfo(name, ours, tuple(shape), count, count * bits // 8)


def remote_tensor(file: Path, name: str, dtype: str, shape: list[int]) -> TensorInfo:
    """A tensor as a header that safetensors itself has not checked describes it. Raises `UserError`."""
    known = dtype in _NAMES or dtype[:1] in ("I", "U") and dtype[1:] in ("8", "16", "32", "64")
    if not known or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise _damaged(file, f"{name[:100]} is described as {str(dtype)[:20]} {str(shape)[:60]}")
    return _tensor(file, name, dtype, shape)


def _damaged(file: Path, how: str) -> UserError:
    return UserError(
        f"{file.name} in {file.parent} is damaged: {how[:300]}.", "Download or copy this file again."
    )
