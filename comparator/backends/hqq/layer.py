"""An HQQ layer as a torch module, and the same weights in the layout of torch's 4-bit matmul."""

from __future__ import annotations

from typing import Any

import torch
from hqq.core import quantize as hqq

from comparator.backends.dtypes import torch_dtype
from comparator.backends.hqq.layout import PACKING, Layout
from comparator.util.compat import torch as compat

Tensor = torch.Tensor


class HQQLinear(hqq.HQQLinear):
    """hqq's layer with scales and zero points as buffers instead of entries of a dict: transformers loads them by name, and
    `.to()` moves them. hqq's own methods see the dict that they expect. peft knows the layer by the name of its class.

    Attributes:
        int4pack: the codes are in the layout of torch's 4-bit matmul, which reads them packed.
    """

    # hqq replaces these with methods for its dict.
    state_dict = torch.nn.Module.state_dict
    _load_from_state_dict = torch.nn.Module._load_from_state_dict
    load_state_dict = torch.nn.Module.load_state_dict
    to, cuda, cpu = torch.nn.Module.to, torch.nn.Module.cuda, torch.nn.Module.cpu
    half, float, bfloat16, double = (
        torch.nn.Module.half,
        torch.nn.Module.float,
        torch.nn.Module.bfloat16,
        torch.nn.Module.double,
    )
    type = torch.nn.Module.type

    def __init__(self, layout: Layout, outputs: int, inputs: int, dtype: torch.dtype, bias: Any = None):
        """Without weights yet. bias: the parameter of the layer in whose place this one comes, or None."""
        torch.nn.Module.__init__(self)
        self.layout, self.in_features, self.out_features = layout, inputs, outputs
        self.compute_dtype, self.offload_meta, self.ready = dtype, False, True
        self.int4pack = False
        self.quant_config = hqq.BaseQuantizeConfig(
            nbits=layout.bits, group_size=layout.group, axis=layout.axis
        )
        self.quant_config.pop("offload_meta")
        kind = torch_dtype(layout.view) if layout.view else getattr(torch, layout.dtype)
        self.register_buffer("W_q", torch.empty(layout.stored(outputs, inputs), dtype=kind, device="meta"))
        for name in ("scale", "zero"):
            self.register_buffer(
                name, torch.empty(layout.scales(outputs, inputs), dtype=dtype, device="meta")
            )
        self.bias = bias

    @classmethod
    def quantized(cls, weight: Tensor, layout: Layout, dtype: torch.dtype, bias: Any = None) -> HQQLinear:
        """A weight (out, in), rounded by hqq on its own device."""
        layer = cls(layout, *weight.shape, dtype, bias)
        settings = layer.quant_config["weight_quant_params"]
        codes, meta = hqq.Quantizer.quantize(
            weight, device=str(weight.device), compute_dtype=dtype, **settings
        )
        layer.W_q = codes.contiguous()
        layer.scale, layer.zero = (meta[name].to(dtype).contiguous() for name in ("scale", "zero"))
        return layer

    @property
    def device(self) -> torch.device:
        return self.W_q.device

    @property
    def meta(self) -> dict[str, Any]:
        """What hqq's functions ask for."""
        layout = self.layout
        return {
            "nbits": layout.bits, "group_size": layout.group, "axis": layout.axis, "scale": self.scale, "zero": self.zero,
            "shape": torch.Size((self.out_features, self.in_features)), "packing": PACKING[layout.bits],
            "unpack_view_dtype": getattr(torch, layout.dtype), "view_as_float": self.W_q.is_floating_point(),
            "compute_dtype": self.compute_dtype, "quant_scale": False, "quant_zero": False,
        }  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out). With gradients hqq's own function, which unpacks again for the backward pass instead of
        keeping the unpacked weight."""
        if self.int4pack:
            rows = x.reshape(-1, self.in_features)
            out = compat.int4_matmul(rows, self.W_q, self.layout.group, self.scales_and_zeros)
            out = out.reshape(*x.shape[:-1], self.out_features)
            return out if self.bias is None else out + self.bias
        rows = x.to(self.compute_dtype)
        needs_gradients = torch.is_grad_enabled() and x.requires_grad
        out = self.forward_pytorch_backprop(rows) if needs_gradients else self.forward_pytorch(rows)
        return out.to(x.dtype)

    def dequantize(self) -> Tensor:
        """The weight (out, in)."""
        if not self.int4pack:
            return super().dequantize()
        return compat.int4_unpack(self.W_q, self.in_features, self.layout.group, self.scales_and_zeros)

    def finish(self) -> None:
        """After loading: packed bytes that were stored as floats become integers again."""
        if self.W_q.is_floating_point():
            self.W_q = self.W_q.view(getattr(torch, self.layout.dtype))

    def fits_int4pack(self) -> bool:
        """Whether torch's 4-bit matmul takes the layer."""
        layout, inputs, outputs = self.layout, self.in_features, self.out_features
        if (layout.bits, layout.axis, self.compute_dtype) != (4, 1, torch.bfloat16):
            return False
        rows = 8 if self.W_q.is_cuda else 16
        whole = outputs % rows == 0 and (not self.W_q.is_cuda or compat.int4_inner_tiles(inputs) > 0)
        return whole and layout.group in (32, 64, 128, 256)

    def use_int4pack(self) -> None:
        """Rearrange the codes for torch's 4-bit matmul. It multiplies by (code − 8) · scale + zero, so that hqq's zero points z
        become (8 − z) · scale, rounded to bf16."""
        codes = hqq.Quantizer.unpack[PACKING[4]](self.W_q, dtype=torch.uint8)
        codes = codes.reshape(self.out_features, self.in_features)
        self.W_q = compat.int4_pack(codes)
        shape = (self.out_features, self.in_features // self.layout.group)
        scale, zero = self.scale.float().reshape(shape), self.zero.float().reshape(shape)
        both = torch.stack([scale, (8 - zero) * scale], dim=2).transpose(0, 1)  # (groups, out, 2)
        self.register_buffer("scales_and_zeros", both.contiguous().bfloat16())
        del self.scale, self.zero
        self.int4pack = True
