"""How a column decodes: step by step in Python, or by replaying one captured CUDA graph per token.

`Decoder` decides and prepares; `generate.stream` does the rest. Knows token ids and models only: nothing of pages,
comparisons or variants' notation.
"""

from comparator.decode.decoder import Decoder, Plan

__all__ = ["Decoder", "Plan"]
