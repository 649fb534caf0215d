"""GGUF files as they are, executed by llama.cpp."""

from comparator.backends.gguf.backend import Gguf, quantized_types

__all__ = ["Gguf", "quantized_types"]
