"""Checkpoints that hqq quantized and transformers 4 saved: how each layer is stored, and what is wrong with them.

hqq writes its settings beside every weight, text as numbers of characters, and reads the dtype back with `eval`. Here they
are compared with what can be meant. Loads no weights.
"""

from __future__ import annotations

import struct
from collections import Counter
from dataclasses import dataclass

from comparator.backends.hqq.layout import BITS, PACKING, Layout
from comparator.core.errors import UserError
from comparator.sources import Checkpoint, weights

_SUFFIX = ".W_q"
_MOST_BYTES = 64  # of a setting
_DTYPES = {"torch.float32": "fp32", "torch.float16": "fp16", "torch.bfloat16": "bf16"}
_AGAIN = "It is damaged or of another version of hqq: download it again, or quantize on the spot with hqq."
_FORMATS = {1: "<B", 4: "<i", 8: "<q"}


@dataclass(frozen=True)
class ReadyMade:
    """layouts: by module. dtype: of scales and zero points, in which the layers multiply."""

    layouts: dict[str, Layout]
    dtype: str

    @property
    def usual(self) -> Layout:
        """Of most layers."""
        return Counter(self.layouts.values()).most_common(1)[0][0]


def read(checkpoint: Checkpoint) -> ReadyMade:
    """Raises `UserError` naming the first layer that is damaged, or stored as hqq does not store it today."""
    stored = {s.info.name: s for s in weights.read_folder(checkpoint.path, checkpoint.source)}
    modules = [name.removesuffix(_SUFFIX) for name in stored if name.endswith(_SUFFIX)]
    if not modules:
        raise UserError(f"{checkpoint.source} says hqq, but contains no packed weight (W_q).", _AGAIN)
    layouts, dtypes = {}, Counter[str]()
    for module in modules:
        layouts[module], dtype = _Layer(checkpoint.source, module, stored).read()
        dtypes[dtype] += 1
    return ReadyMade(layouts, dtypes.most_common(1)[0][0])


class _Layer:
    """The tensors of one layer by name."""

    def __init__(self, source: str, module: str, stored: dict[str, weights.Stored]):
        self.source, self.module, self.stored = source, module, stored

    def read(self) -> tuple[Layout, str]:
        """(layout, dtype it multiplies in)."""
        if self._number("quant_scale", 0) or self._number("quant_zero", 0):
            raise self._wrong("has quantized scales, which hqq no longer supports")
        outputs, inputs = self._shape()
        layout = Layout(self._number("nbits"), self._number("group_size"), self._number("axis"), self._view())
        if layout.bits not in BITS or layout.axis not in (0, 1) or not 0 < layout.group <= outputs * inputs:
            raise self._wrong(f"has nbits {layout.bits}, axis {layout.axis}, group_size {layout.group}")
        if not layout.divides(outputs, inputs):
            raise self._wrong(
                f"has groups of {layout.group}, which do not divide its shape {(outputs, inputs)}"
            )
        if (packing := self._text("packing")) != PACKING[layout.bits]:
            raise self._wrong(f"is packed as {packing!r}, not {PACKING[layout.bits]}")
        self._expect("W_q", layout.stored(outputs, inputs), (layout.view or layout.dtype,))
        for name in ("scale", "zero"):
            self._expect(name, layout.scales(outputs, inputs), tuple(_DTYPES.values()))
        dtype = self._text("compute_dtype")
        if dtype not in _DTYPES:
            raise self._wrong(f"multiplies in {dtype!r}")
        return layout, _DTYPES[dtype]

    def _view(self) -> str:
        """The float dtype that packed bytes are stored as, or ""."""
        kind = self._tensor("W_q").info.dtype
        return kind if self._number("view_as_float", 0) and kind in _DTYPES.values() else ""

    def _shape(self) -> tuple[int, int]:
        data = self._bytes("shape")
        if len(data) != 16:
            raise self._wrong("does not say its shape")
        outputs, inputs = struct.unpack("<qq", data)
        if not (0 < outputs < 2**31 and 0 < inputs < 2**31):
            raise self._wrong(f"says its shape is {(outputs, inputs)}")
        return outputs, inputs

    def _number(self, name: str, default: int | None = None) -> int:
        if default is not None and f"{self.module}.{name}" not in self.stored:
            return default
        data = self._bytes(name)
        if len(data) not in _FORMATS:
            raise self._wrong(f"has no number as {name}")
        return struct.unpack(_FORMATS[len(data)], data)[0]

    def _text(self, name: str) -> str:
        return self._bytes(name).decode("ascii", "replace")

    def _expect(self, name: str, shape: tuple[int, int], dtypes: tuple[str, ...]) -> None:
        info = self._tensor(name).info
        if info.shape != shape or info.dtype not in dtypes:
            raise self._wrong(
                f"has a {name} of {info.dtype} {info.shape}; its settings make it {' or '.join(dtypes)} {shape}"
            )

    def _bytes(self, name: str) -> bytes:
        """Of a setting, which hqq stores as a tensor of its own."""
        tensor = self._tensor(name)
        if tensor.info.bytes > _MOST_BYTES:
            raise self._wrong(f"has {tensor.info.bytes:,} bytes as {name}")
        with open(tensor.file, "rb") as file:
            file.seek(tensor.start)
            return file.read(tensor.info.bytes)

    def _tensor(self, name: str) -> weights.Stored:
        if (tensor := self.stored.get(f"{self.module}.{name}")) is None:
            raise self._wrong(f"has no {name} for its packed weight")
        return tensor

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self.module} of {self.source} {what}.", _AGAIN)
