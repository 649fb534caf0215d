"""The comparison document ↔ JSON, as the README documents it. Defined in `comparator.core.document`."""

from comparator.core.document import dumps, loads

__all__ = ["dumps", "loads"]
