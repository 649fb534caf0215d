"""A gptqmodel layer in memory → its weight as float32, from the packed layouts of the checkpoint (int32 words along the
inputs) and of PyTorch's 4-bit CPU kernel. Independent of gptqmodel's own unpacking, so that it checks the kernels.
"""

from __future__ import annotations

from typing import Any

from comparator.util.compat.torch import int4_matmul


def weight(module: Any) -> Any | None:
    """(outputs, inputs) float32 on the module's device; None for a layout that is not known here."""
    if getattr(module, "scales_and_zeros", None) is not None and str(module.qweight.dtype) == "torch.uint8":
        return _aten(module)
    if str(module.qweight.dtype) == "torch.int32" and type(module).__name__ != "MarlinLinear":
        return _checkpoint(module)
    return None


def _checkpoint(module: Any) -> Any | None:
    """w[i, o] = scale[g(i), o] × (code[i, o] − zero[g(i), o])."""
    if type(module).__name__ == "ExllamaV2Linear":  # shuffled in place when it was made ready
        return None
    bits = module.bits
    codes = unpack(module.qweight.T, bits, module.in_features).T
    zeros = unpack(module.qzeros, bits, module.out_features)
    if not type(module).REQUIRES_FORMAT_V2:  # then zero points stay as the first format has them, less one
        zeros = (zeros + 1) & (2**bits - 1)
    group = module.g_idx.long().to(codes.device)
    return ((codes - zeros[group]).float() * module.scales.float()[group]).T.contiguous()


def unpack(words: Any, bits: int, count: int) -> Any:
    """(n, words) int32 → (n, count) codes: value k lies in bits k × `bits` onwards of the row's bit stream, the
    lowest bit first, also across words (3 bits)."""
    import torch

    place = torch.arange(count, device=words.device) * bits
    first, offset = place // 32, place % 32
    wide = words.long() & 0xFFFFFFFF
    following = torch.clamp(first + 1, max=words.shape[1] - 1)
    both = wide[:, first] | (wide[:, following] << 32)
    return ((both >> offset) & (2**bits - 1)).int()


def _aten(module: Any) -> Any | None:
    """PyTorch's layout for AVX-512 and AVX2 CPUs, taken back by asking the kernel itself: it multiplies the identity."""
    import torch

    eye = torch.eye(module.in_features, dtype=torch.bfloat16)
    product = int4_matmul(eye, module.qweight, module.group_size, module.scales_and_zeros)
    columns = product.float().T.contiguous()  # in the kernel's order of inputs
    restored = torch.empty_like(columns)
    restored[:, module.ret_idx.long()] = columns
    return restored
