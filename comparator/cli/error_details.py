"""Where the traceback of a failure is, for a bug report; with --verbose the traceback itself."""

from __future__ import annotations

import logging
from collections.abc import Callable

from comparator.util import error_log


def show(error_id: str | None, line: Callable[[str], None]) -> None:
    """Print through `line` where the report of this id was logged; nothing for None, a problem with no report."""
    report = error_log.find(error_id)
    if report is None:
        return
    if verbose():
        line(report.details)
    elif report.log_file:
        line(f"Details: error {report.id} in {error_log.log_file()} (--verbose prints them)")


def verbose() -> bool:
    """Whether --verbose was given: `progress.quiet` sets this level."""
    return logging.getLogger("comparator").isEnabledFor(logging.DEBUG)
