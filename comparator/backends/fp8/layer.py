"""A linear layer whose weight stays in FP8, with its scales as the checkpoint stores them."""

from __future__ import annotations

import torch
from torch.nn import functional

from comparator.backends import row_matmul


class FP8Linear(torch.nn.Linear):
    """weight: (out, in) of FP8. weight_scale_inv: (out ÷ rows, in ÷ columns), or one number for the whole weight.

    The weight is unpacked to the activations' dtype before each matmul; activations are not rounded.
    """

    def __init__(
        self,
        linear: torch.nn.Linear,
        compute_dtype: torch.dtype,
        scale_dtype: torch.dtype,
        scales: tuple[int, ...],
        activation_scale: tuple[int, ...] | None = None,
    ):
        """In place of `linear`, without weights yet. scales, activation_scale: the shapes of weight_scale_inv and of the scale for
        activations as stored, where there is one."""
        torch.nn.Module.__init__(self)
        self.compute_dtype = compute_dtype
        self.in_features, self.out_features = linear.in_features, linear.out_features
        empty = torch.empty(linear.weight.shape, dtype=torch.float8_e4m3fn, device="meta")
        self.weight = torch.nn.Parameter(empty, requires_grad=False)
        self.register_buffer("weight_scale_inv", torch.empty(scales, dtype=scale_dtype, device="meta"))
        self.bias = linear.bias
        if (
            activation_scale is not None
        ):  # for kernels that round activations: taken from the file, used by none here
            self.register_buffer("activation_scale", torch.empty(activation_scale, device="meta"))

    def finish(self) -> None:
        """After loading: scales as float32 (…, …), one byte each before where they are powers of two."""
        if hasattr(self, "activation_scale"):
            del self.activation_scale
        scale = self.weight_scale_inv
        if scale.dtype == torch.uint8:  # their exponents alone
            scale = (scale.float() - 127).exp2()
        self.weight_scale_inv = scale.float() if scale.dim() == 2 else scale.float().reshape(1, 1)

    def dequantize(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight (out, in): multiplied in float32, then rounded to `dtype`."""
        rows, columns = self.weight_scale_inv.shape
        blocks = self.weight.float().view(rows, self.out_features // rows, columns, -1)
        return (blocks * self.weight_scale_inv[:, None, :, None]).view(self.weight.shape).to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.dequantize(x.dtype), self.bias)

    def codes(self) -> row_matmul.Codes:
        return row_matmul.Codes(self.weight, self.weight_scale_inv)
