"""Codes from packed int32 words, and weights from the layout of PyTorch's 4-bit CPU kernel. Independent of gptqmodel's
own unpacking, so that it checks the kernels.
"""

from __future__ import annotations

from typing import Any

from comparator.util.compat.torch import int4_unpack


def codes(words: Any, bits: int, count: int) -> Any:
    """(n, words) int32 → (n, count) codes: value k lies in bits k × `bits` onwards of the row's bit stream, the
    lowest bit first, also across words (3 bits)."""
    import torch

    place = torch.arange(count, device=words.device) * bits
    first, offset = place // 32, place % 32
    wide = words.long() & 0xFFFFFFFF
    following = torch.clamp(first + 1, max=words.shape[1] - 1)
    both = wide[:, first] | (wide[:, following] << 32)
    return ((both >> offset) & (2**bits - 1)).int()


def is_aten(module: Any) -> bool:
    """Whether the layer's weight has been rearranged for PyTorch's CPU kernel, at its first use."""
    return (
        getattr(module, "scales_and_zeros", None) is not None and str(module.qweight.dtype) == "torch.uint8"
    )


def aten(module: Any) -> Any:
    """(outputs, inputs) float32 from PyTorch's layout for AVX-512 and AVX2 CPUs."""
    import torch

    weight = int4_unpack(module.qweight, module.in_features, module.group_size, module.scales_and_zeros)
    columns = weight.float()  # in the kernel's order of inputs
    order = getattr(module, "ret_idx", None)
    if order is None:
        return columns
    restored = torch.empty_like(columns)
    restored[:, order.long()] = columns
    return restored
