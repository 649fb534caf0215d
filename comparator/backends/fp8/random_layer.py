"""Random FP8 layers for benchmarks, with a scale per block of 128×128 as DeepSeek writes them."""

from __future__ import annotations

from typing import Any

BLOCK = 128
CONFIG = {
    "quantization_config": {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK],
    },
}  # fmt: skip
_LARGEST = 448  # of e4m3


def tensors(outputs: int, inputs: int, std: float, generator: Any) -> dict[str, Any]:
    """The stored tensors of one layer: normal values of standard deviation `std`, rounded in blocks; in bf16 where blocks
    do not divide the layer."""
    import torch

    if outputs % BLOCK or inputs % BLOCK:
        plain = torch.randn((outputs, inputs), generator=generator, device=generator.device) * std
        return {"weight": plain.bfloat16()}
    shape = (outputs // BLOCK, BLOCK, inputs // BLOCK, BLOCK)
    weight = torch.randn(shape, generator=generator, device=generator.device) * std
    scale = weight.abs().amax((1, 3)) / _LARGEST  # (blocks of rows, blocks of columns)
    codes = (weight / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    return {"weight": codes.view(outputs, inputs), "weight_scale_inv": scale}
