"""The transformers code that reproduces a column. Defined in `comparator.reporting.snippet`."""

from comparator.reporting.snippet import snippet

__all__ = ["snippet"]
