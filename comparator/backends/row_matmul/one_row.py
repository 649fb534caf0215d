"""One row times a weight of codes that are read as they are stored: the matmul of a decode step, without unpacking.

    y[n] = Σ over groups g of scale[n, g] · Σ over k in g of x[k] · (code[n, k] − zero[n, g])

Libraries without a kernel for a packed weight unpack it to 16 bits first, which at one row costs several times what reading
the codes does. Used while decoding in a CUDA graph; prefill and eager decoding stay the library's own. All sums are in
float32, so results differ from the library's by the rounding of its unpacked weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

NOTE = (
    "Decoded with a matmul that reads the codes as they are stored, instead of the library's, which unpacks each weight "
    "first; the same codes and scales, summed in float32."
)


@dataclass(frozen=True)
class Codes:
    """A weight (outputs, inputs) as codes.

    Attributes:
        codes: (outputs ÷ planes, inputs) of uint8, int8 or FP8. An element holds `planes` codes of `bits` bits, the highest first;
            plane p has rows p · outputs ÷ planes and on.
        scale, zero: (outputs, groups), groups along a row; (1, 1) for one of the whole tensor, and fewer rows than outputs for blocks
            of several rows. zero: None where it is 0.
    """

    codes: Any
    scale: Any
    zero: Any = None
    bits: int = 8

    @property
    def planes(self) -> int:
        return 8 // self.bits

    @property
    def shape(self) -> tuple[int, int]:
        rows, inputs = self.codes.shape
        return rows * self.planes, inputs

    @property
    def block_rows(self) -> int:
        """Rows that share a row of scales."""
        return self.shape[0] // self.scale.shape[0]

    @property
    def group(self) -> int:
        return self.codes.shape[1] // self.scale.shape[1]


def runs_on(weight: Codes) -> bool:
    """Whether the kernel takes the weight: groups are whole rows or powers of 2, and the card reads its codes."""
    inputs = weight.codes.shape[1]
    power = weight.group & (weight.group - 1) == 0 and 8 <= weight.group <= 512
    if not (weight.scale.shape[1] == 1 or power) or inputs % 16:
        return False
    if weight.codes.device.type != "cuda" or not weight.codes.dtype.is_floating_point:
        return True
    import torch

    return torch.cuda.get_device_capability(weight.codes.device) >= (8, 9)


def one_row(x: Any, weight: Codes, bias: Any = None) -> Any:
    """`x` (…, inputs) with one row in all → (…, outputs) in x's dtype."""
    row = x.reshape(-1)
    if row.numel() != weight.shape[1]:
        raise ValueError(f"one row of {weight.shape[1]} at a time, not {tuple(x.shape)}")
    if x.device.type == "cuda":
        out = _kernel(row, weight, bias)
    else:
        out = plain(row, weight)
        out = (out if bias is None else out + bias).to(x.dtype)
    return out.view(*x.shape[:-1], -1)


def plain(row: Any, weight: Codes) -> Any:
    """The formula in plain torch, float32 (outputs,): what the kernel is tested against."""
    import torch

    codes, (outputs, inputs) = weight.codes, weight.shape
    if weight.planes > 1:
        shifts = [weight.bits * (weight.planes - 1 - p) for p in range(weight.planes)]
        codes = torch.cat([(codes >> shift) & (2**weight.bits - 1) for shift in shifts])
    groups = codes.float().reshape(outputs, weight.scale.shape[1], -1)
    scale, zero = (None if t is None else t.float().repeat_interleave(weight.block_rows, 0)[..., None]
                   for t in (weight.scale, weight.zero))  # fmt: skip
    if zero is not None:
        groups = groups - zero
    return ((groups * scale).reshape(outputs, inputs) @ row.float()).float()


def _kernel(row: Any, weight: Codes, bias: Any) -> Any:
    import torch

    outputs, inputs = weight.shape
    stored, groups = weight.codes.shape[0], weight.scale.shape[1]
    out = torch.empty(outputs, dtype=row.dtype, device=row.device)
    floats = weight.codes.dtype.is_floating_point
    rows, block = 2, 1024 if floats and groups == 1 else 512  # fastest over 8B shapes on an H200
    group = block if groups == 1 else weight.group
    _module().packed_row[(-(-stored // rows),)](
        row.contiguous(), weight.codes, weight.scale, weight.scale if weight.zero is None else weight.zero,
        row if bias is None else bias, out,
        stored, inputs, groups,
        FLOAT=floats, BLOCK_ROWS=weight.block_rows, BITS=weight.bits, PLANES=weight.planes, GROUPED=groups > 1, HAS_ZERO=weight.zero is not None,
        HAS_BIAS=bias is not None,
        ROWS=rows, GROUPS=max(1, block // group), GROUP=group, num_warps=1,
    )  # fmt: skip
    return out


@cache
def _module() -> Any:
    from comparator.backends.row_matmul import triton_kernel

    return triton_kernel
