"""HQQ: weights rounded without calibration data, by half-quadratic optimization of scales and zero points."""

from comparator.backends.hqq.backend import Hqq

__all__ = ["Hqq"]
