"""Reports of a comparison, as the README documents them. Defined in `comparator.reporting`."""

from comparator.reporting.export import FORMATS, render, write

__all__ = ["FORMATS", "render", "write"]
