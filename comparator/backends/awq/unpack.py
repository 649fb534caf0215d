"""An AWQ layer in memory → its weight as float32, from the packed layout of the checkpoint (int32 words along the
outputs) and of PyTorch's 4-bit CPU kernel.
"""

from __future__ import annotations

from typing import Any

from comparator.backends.gptqmodel_layers.unpack import aten, codes, is_aten

# Where output k of eight lies in a word of 4-bit codes, as AutoAWQ's GPU kernel wants them.
PLACE = (0, 4, 1, 5, 2, 6, 3, 7)


def weight(module: Any) -> Any | None:
    """(outputs, inputs) float32 on the module's device; None for a layout that is not known here."""
    if is_aten(module):
        return aten(module)
    # Marlin and ExLlamaV2 rearrange the codes when they are made ready.
    if str(module.qweight.dtype) != "torch.int32" or type(module).__name__ in (
        "AwqMarlinLinear",
        "AwqExllamaV2Linear",
    ):
        return None
    return unpacked(module.qweight, module.qzeros, module.scales, module.bits)


def unpacked(qweight: Any, qzeros: Any, scales: Any, bits: int) -> Any:
    """w[o, i] = scale[g(i), o] × (code[i, o] − zero[g(i), o]) as (outputs, inputs) float32.

    qweight (inputs, words) and qzeros (groups, words) int32, scales (groups, outputs).
    """
    groups, outputs = scales.shape
    values, zeros = (_in_order(codes(words, bits, outputs), bits) for words in (qweight, qzeros))
    size = qweight.shape[0] // groups
    values = values.reshape(groups, size, outputs)
    plain = (values - zeros[:, None]).float() * scales.float()[:, None]
    return plain.reshape(-1, outputs).T.contiguous()


def _in_order(values: Any, bits: int) -> Any:
    """Codes of one word in the order of the outputs; only 4-bit words are shuffled."""
    if bits != 4:
        return values
    return values.reshape(values.shape[0], -1, 8)[:, :, list(PLACE)].reshape(values.shape)
