"""How a column decodes: step by step in Python, or by replaying one captured CUDA graph per token.

`Decoder` chooses and prepares the path; `generate.stream` decodes.
"""

from comparator.decoding.planner import Decoder, Plan

__all__ = ["Decoder", "Plan"]
