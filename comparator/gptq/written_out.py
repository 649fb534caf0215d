"""GPTQ's product for one token in plain torch, for torch.compile to make one kernel of.

gptqmodel's TorchLinear unpacks a whole layer to 16 bits and multiplies: at batch 1 it moves nine bytes for each that is
stored. Written as one expression, a compiler reads the packed words alone:

    y[n] = Σ over words i of scale[g(i), n] · (Σⱼ x[8i + j] · code(word[i, n], j) − zero[g(i), n] · Σⱼ x[8i + j])

with codes and zero points as integers and the sum in float32. Same codes, scales and zero points; TorchLinear rounds
each unpacked weight to 16 bits on the way, this does not. Knows one layer and one row; nothing of models.
"""

from __future__ import annotations

from typing import Any

NOTE = (
    "Compiled, a GPTQ layer's unpacking and product are one kernel, which torch.compile writes from their formula; "
    "gptqmodel's TorchLinear does them one after the other."
)


def applies(module: Any) -> bool:
    """Whether the layer is packed as the formula has it: whole codes in each word, groups in order."""
    if (
        type(module).__name__ != "TorchLinear"
        or module.bits not in (2, 4, 8)
        or getattr(module, "adapter", None)
    ):
        return False
    words, group = module.qweight, module.group_size if module.group_size > 0 else module.in_features
    codes = 32 // module.bits
    if str(words.dtype) != "torch.int32" or group % codes or module.in_features % group:
        return False
    if words.shape != (module.in_features // codes, module.out_features):
        return False
    order = module.g_idx.cpu().long()
    return bool((order == order.new_tensor(range(module.in_features)) // group).all())


def row(module: Any, x: Any) -> Any:
    """x (…, inputs) with one row in all → (…, outputs), in x's dtype."""
    import torch

    bits, codes = module.bits, 32 // module.bits
    groups, outputs = module.scales.shape
    inside = module.in_features // groups // codes  # words of a group, along the inputs
    mask = (1 << bits) - 1
    words = module.qweight.view(groups, inside, outputs)
    values = x.reshape(groups, inside, codes).float()
    total = 0.0
    for place in range(codes):
        code = (words >> (bits * place)) & mask
        total = total + values[:, :, place, None] * code.float()
    shifts = torch.arange(0, 32, bits, device=x.device, dtype=torch.int32)
    zeros = ((module.qzeros.unsqueeze(-1) >> shifts) & mask).view(groups, 1, outputs).float()
    scales = module.scales.view(groups, 1, outputs).float()
    y = ((total - zeros * values.sum(-1, keepdim=True)) * scales).sum(dim=(0, 1))
    if module.bias is not None:
        y = y + module.bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], outputs)
