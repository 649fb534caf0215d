"""The local engine of this process, behind the allow-list."""

from __future__ import annotations

from functools import cache

from comparator.deploy.limits import check_source
from comparator.engine.local import LocalEngine


@cache
def process_engine() -> LocalEngine:
    """The one local engine of this process; it opens only what COMPARATOR_ALLOWED_MODELS allows."""
    return LocalEngine(check_source=check_source)
