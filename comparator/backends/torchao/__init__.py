"""torchao: see `backend`."""

from comparator.backends.torchao.backend import TorchAo

__all__ = ["TorchAo"]
