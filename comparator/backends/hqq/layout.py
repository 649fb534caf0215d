"""How an HQQ layer is stored: shapes of its packed weight, scales and zero points, as hqq 0.2.8 packs them
(hqq/core/bitpack.py). No torch here: headers are checked with it."""

from __future__ import annotations

from dataclasses import dataclass

BITS = (2, 3, 4, 8)
PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8"}
_VALUES = {8: 1, 4: 2, 3: 10, 2: 4}  # in each stored element, which is int32 for 3 bits, else uint8
_FLOAT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}


@dataclass(frozen=True)
class Layout:
    """group: weights that share a scale and a zero point. axis: 1 where a group lies in a row of the (out, in) weight, 0
    where it takes one weight of each of `group` blocks. view: "" or the float dtype that the packed bytes are stored as."""

    bits: int
    group: int
    axis: int = 1
    view: str = ""

    @property
    def dtype(self) -> str:
        """Of the packed weight."""
        return "int32" if self.bits == 3 else "uint8"

    def divides(self, outputs: int, inputs: int) -> bool:
        """Whether a weight of this shape can be grouped and packed. hqq packs whole groups side by side."""
        rows, columns = self._grouped(outputs, inputs)
        whole = rows * columns == outputs * inputs and (self.axis == 0 or inputs % self.group == 0)
        return whole and (self.bits == 3 or rows % _VALUES[self.bits] == 0)

    def packed(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Shape of the packed weight in `dtype`."""
        rows, columns = self._grouped(outputs, inputs)
        return -(-rows // _VALUES[self.bits]), columns

    def stored(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Shape of the packed weight in the file: other than `packed` where it is viewed as floats."""
        rows, columns = self.packed(outputs, inputs)
        width = 4 if self.bits == 3 else 1
        return rows, columns * width // _FLOAT_BYTES[self.view] if self.view else columns

    def scales(self, outputs: int, inputs: int) -> tuple[int, int]:
        """Shape of the scales, and of the zero points."""
        rows, columns = self._grouped(outputs, inputs)
        return (rows, 1) if self.axis == 1 else (1, columns)

    def bytes(self, outputs: int, inputs: int, width: int) -> tuple[int, int]:
        """Of the packed weight, and of scales and zero points, whose values take `width` bytes."""
        rows, columns = self.packed(outputs, inputs)
        one, other = self.scales(outputs, inputs)
        return rows * columns * (4 if self.bits == 3 else 1), 2 * one * other * width

    def _grouped(self, outputs: int, inputs: int) -> tuple[int, int]:
        others = outputs * inputs // self.group
        return (others, self.group) if self.axis == 1 else (self.group, others)
