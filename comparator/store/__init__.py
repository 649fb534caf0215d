"""Saved comparisons: an immutable document each, an index over them, and what may change beside them.

`open_store()` is the way in; `store.py` says how it is used.
"""

from __future__ import annotations

from comparator.store.index import Entry
from comparator.store.links import BadId
from comparator.store.store import Deleted, NotFound, NotYours, Store, open_store

__all__ = ["BadId", "Deleted", "Entry", "NotFound", "NotYours", "Store", "open_store"]
