"""AutoRound's checkpoints: the backend, and what their configs mean. Importing any of these imports no torch."""

from comparator.backends.autoround.backend import AutoRound

__all__ = ["AutoRound"]
