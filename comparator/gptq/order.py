"""ExLlamaV2 without a table of the row order, where the rows are in order.

With act-order the rows of a packed weight are sorted by group, and the kernel picks each input element through a table.
Without it the rows lie in order, every group after the other, and the kernel can take the input as it comes; but gptqmodel
hands it `g_idx` all the same, and so each block of threads looks up a table that says “the n-th is the n-th”. Here the
table is left out where that is what it says. Same weights, same sums. Knows nothing of models.
"""

from __future__ import annotations

from typing import Any


def in_order(g_idx: Any, group_size: int) -> bool:
    """Whether row r belongs to group r // group_size: `g_idx` (rows,) int."""
    import torch

    rows = torch.arange(g_idx.numel(), device=g_idx.device, dtype=g_idx.dtype)
    return bool(torch.equal(g_idx, rows // group_size))


def without_table(tensors: dict[str, Any], group_size: int) -> dict[str, Any]:
    """What ExLlamaV2 is made from, without `g_idx` where that says nothing."""
    g_idx = tensors.get("g_idx")
    if g_idx is None or group_size < 1 or not in_order(g_idx, group_size):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != "g_idx"}


def patch() -> bool:
    """Have gptqmodel's ExLlamaV2 layers made so. False where this release makes them another way, which leaves the
    library as it is. Once is enough; again does nothing."""
    try:
        from gptqmodel.nn_modules.qlinear.exllamav2 import ExllamaV2Linear

        own = ExllamaV2Linear.ext_make_q_matrix
    except (ImportError, AttributeError):
        return False
    if getattr(own, "comparator_order", False):
        return True

    def ext_make_q_matrix(self, w: dict, temp_dq, key: str | None = None):
        return own(self, without_table(w, self.group_size), temp_dq, key)

    ext_make_q_matrix.comparator_order = True
    ExllamaV2Linear.ext_make_q_matrix = ext_make_q_matrix
    return True
