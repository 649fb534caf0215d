"""Random 4-bit codes and scales for benchmarks, of layers with zero point 8 in groups of 128."""

from __future__ import annotations

from typing import Any

GROUP = 128


def words(shape: tuple[int, int], generator: Any) -> Any:
    """int32 of `shape`, eight codes in each. 1 … 15: as many levels below the zero point as above. A mean that is not 0 would
    be multiplied up by every layer until fp16 overflows."""
    import torch

    packed = torch.zeros(shape, dtype=torch.int32, device=generator.device)
    for place in range(8):
        code = torch.randint(1, 16, shape, generator=generator, device=generator.device, dtype=torch.int32)
        packed |= code << (4 * place)
    return packed


def scales(outputs: int, inputs: int, std: float, generator: Any) -> Any:
    """float16 (inputs ÷ 128, outputs) with which the weights have the standard deviation `std`."""
    import torch

    level = std / (sum((v - 8) ** 2 for v in range(1, 16)) / 15) ** 0.5
    spread = torch.rand((inputs // GROUP, outputs), generator=generator, device=generator.device)
    return (level * (0.75 + 0.5 * spread)).to(torch.float16)
