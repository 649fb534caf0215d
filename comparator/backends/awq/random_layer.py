"""Random AWQ layers for benchmarks: 4 bits in groups of 128, as AutoAWQ writes them."""

from __future__ import annotations

from typing import Any

GROUP = 128
CONFIG = {
    "torch_dtype": "float16",
    "quantization_config": {
        "quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm",
        "modules_to_not_convert": None,
    },
}  # fmt: skip


def tensors(outputs: int, inputs: int, std: float, generator: Any) -> dict[str, Any]:
    """The stored tensors of one layer: random 4-bit values around zero point 8, scaled to the standard deviation `std`."""
    import torch

    device = generator.device
    qweight = torch.zeros((inputs, outputs // 8), dtype=torch.int32, device=device)
    for place in range(8):
        # 1 … 15: as many levels below the zero point as above, as in random GPTQ layers.
        value = torch.randint(1, 16, qweight.shape, generator=generator, device=device, dtype=torch.int32)
        qweight |= value << (4 * place)
    level = std / (sum((v - 8) ** 2 for v in range(1, 16)) / 15) ** 0.5
    spread = 0.75 + 0.5 * torch.rand((inputs // GROUP, outputs), generator=generator, device=device)
    return {
        "qweight": qweight,
        "qzeros": torch.full((inputs // GROUP, outputs // 8), 0x88888888 - 2**32, dtype=torch.int32),
        "scales": (level * spread).to(torch.float16),
    }
