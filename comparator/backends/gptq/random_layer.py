"""Random GPTQ layers for benchmarks: 4 bits in groups of 128, as gptqmodel writes them."""

from __future__ import annotations

from typing import Any

from comparator.backends.gptqmodel_layers import random_codes

CONFIG = {
    "torch_dtype": "float16",
    "quantization_config": {
        "quant_method": "gptq", "bits": 4, "group_size": random_codes.GROUP, "desc_act": False, "sym": True,
        "checkpoint_format": "gptq", "lm_head": False,
    },
}  # fmt: skip


def tensors(outputs: int, inputs: int, std: float, generator: Any) -> dict[str, Any]:
    """The stored tensors of one layer: random 4-bit values around zero point 8, scaled to the standard deviation `std`."""
    import torch

    return {
        "qweight": random_codes.words((inputs // 8, outputs), generator),
        # The format `gptq` stores zero − 1: 7 in every half byte.
        "qzeros": torch.full((inputs // random_codes.GROUP, outputs // 8), 0x77777777, dtype=torch.int32),
        "scales": random_codes.scales(outputs, inputs, std, generator),
        "g_idx": torch.arange(inputs, dtype=torch.int32) // random_codes.GROUP,
    }
