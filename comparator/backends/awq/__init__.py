"""AWQ: the backend, kernels, ready-made checkpoints. Importing any of these imports no torch."""

from comparator.backends.awq.backend import Awq

__all__ = ["Awq"]
