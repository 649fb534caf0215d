"""A linear layer of 4-bit integers as compressed-tensors packs them, rearranged for torch's 4-bit matmul."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

from comparator.backends.ct.checks import Int4
from comparator.util.compat import torch as compat


class Int4Linear(torch.nn.Linear):
    """weight_packed, weight_scale, weight_shape, weight_zero_point: as stored, until `finish`. Then weight holds the codes in the
    layout of torch's 4-bit matmul, and scales_and_zeros (groups, out, 2) bf16 a scale and an offset per group: the weight is
    (code − 8) · scale + offset."""

    def __init__(self, linear: torch.nn.Linear, layout: Int4):
        """In place of `linear`, without weights yet."""
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features, self.layout = linear.in_features, linear.out_features, layout
        self.register_parameter("weight", None)
        self.bias = linear.bias
        groups = layout.inputs // layout.group

        def empty(name: str, dtype: torch.dtype, *shape: int) -> None:
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))

        empty("weight_packed", torch.int32, layout.outputs, layout.inputs // 8)
        empty("weight_scale", torch.bfloat16, layout.outputs, groups)
        empty("weight_shape", torch.int64, 2)
        if layout.zeros:
            empty("weight_zero_point", torch.int32, -(-layout.outputs // 8), groups)

    def finish(self) -> None:
        """After loading: codes, scales and zero points in torch's layout."""
        shape = torch.Size((self.out_features, self.in_features))
        codes = (unpack_from_int32(self.weight_packed, 4, shape) + 8).to(torch.uint8)
        scale = self.weight_scale.float()
        if self.layout.zeros:
            zero = unpack_from_int32(self.weight_zero_point, 4, scale.shape, packed_dim=0).float()
            offset = -zero * scale
        else:
            offset = torch.zeros_like(scale)
        both = torch.stack([scale, offset], dim=2).transpose(0, 1)
        self.register_buffer("scales_and_zeros", both.contiguous().bfloat16())
        self.weight = torch.nn.Parameter(compat.int4_pack(codes), requires_grad=False)
        for name in [n for n, _ in self.named_buffers(recurse=False) if n.startswith("weight_")]:
            delattr(self, name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(…, in) → (…, out), multiplied in bf16."""
        rows = x.reshape(-1, self.in_features).bfloat16()
        out = compat.int4_matmul(rows, self.weight, self.layout.group, self.scales_and_zeros)
        out = out.reshape(*x.shape[:-1], self.out_features)
        return (out if self.bias is None else out + self.bias).to(x.dtype)

    def dequantize(self) -> torch.Tensor:
        """The weight (out, in), bf16."""
        return compat.int4_unpack(self.weight, self.in_features, self.layout.group, self.scales_and_zeros)
