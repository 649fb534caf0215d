"""FP8 checkpoints with a scale per block or per tensor, as DeepSeek and Qwen publish them."""

from comparator.backends.fp8.backend import BlockFP8

__all__ = ["BlockFP8"]
