"""A gptqmodel layer in memory → its weight as float32, from the packed layouts of the checkpoint (int32 words along the
inputs) and of PyTorch's 4-bit CPU kernel.
"""

from __future__ import annotations

from typing import Any

from comparator.backends.gptqmodel_layers.unpack import aten, codes, is_aten


def weight(module: Any) -> Any | None:
    """(outputs, inputs) float32 on the module's device; None for a layout that is not known here."""
    if is_aten(module):
        return aten(module)
    if str(module.qweight.dtype) == "torch.int32" and type(module).__name__ != "MarlinLinear":
        return _checkpoint(module)
    return None


def _checkpoint(module: Any) -> Any | None:
    """w[i, o] = scale[g(i), o] × (code[i, o] − zero[g(i), o])."""
    if type(module).__name__ == "ExllamaV2Linear":  # shuffled in place when it was made ready
        return None
    bits = module.bits
    values = codes(module.qweight.T, bits, module.in_features).T
    zeros = codes(module.qzeros, bits, module.out_features)
    if not type(module).REQUIRES_FORMAT_V2:  # then zero points stay as the first format has them, less one
        zeros = (zeros + 1) & (2**bits - 1)
    group = module.g_idx.long().to(values.device)
    return ((values - zeros[group]).float() * module.scales.float()[group]).T.contiguous()
