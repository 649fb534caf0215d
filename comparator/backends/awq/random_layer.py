"""Random AWQ layers for benchmarks: 4 bits in groups of 128, as AutoAWQ writes them."""

from __future__ import annotations

from typing import Any

from comparator.backends.gptqmodel_layers import random_codes

CONFIG = {
    "torch_dtype": "float16",
    "quantization_config": {
        "quant_method": "awq", "bits": 4, "group_size": random_codes.GROUP, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    },
}  # fmt: skip


def tensors(outputs: int, inputs: int, std: float, generator: Any) -> dict[str, Any]:
    """The stored tensors of one layer: random 4-bit values around zero point 8, scaled to the standard deviation `std`."""
    import torch

    return {
        "qweight": random_codes.words((inputs, outputs // 8), generator),
        "qzeros": torch.full(
            (inputs // random_codes.GROUP, outputs // 8), 0x88888888 - 2**32, dtype=torch.int32
        ),
        "scales": random_codes.scales(outputs, inputs, std, generator),
    }
