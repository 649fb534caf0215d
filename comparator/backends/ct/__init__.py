"""compressed-tensors checkpoints: the backend, and what their configs and headers mean. Importing any of these imports no torch."""

from comparator.backends.ct.backend import CompressedTensors

__all__ = ["CompressedTensors"]
