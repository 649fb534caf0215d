"""GPTQ: the backend, calibration texts, quantizing, checkpoints, kernels.

Importing any of these imports no torch; gptqmodel (6 s) even less.
"""

from comparator.backends.gptq.backend import Gptq

__all__ = ["Gptq"]
