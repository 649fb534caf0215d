"""The id of a failure in the error log; on a private page where that is, and "Copy details" for a bug report."""

from __future__ import annotations

from comparator.core.settings import get_settings
from comparator.ui.markup import esc
from comparator.util import error_log


def where(error_id: str | None) -> str:
    """A line as HTML: the id alone for visitors of a public installation, who must not see its paths; "" without an id."""
    if not error_id:
        return ""
    if get_settings().public:
        return (
            f'<p class="error-id">Error {esc(error_id)}: the operator of this page finds it by this id.</p>'
        )
    report = error_log.find(error_id)
    place = f", logged in {esc(error_log.log_file())}" if report and report.log_file else ""
    return f'<p class="error-id">Error {esc(error_id)}{place}</p>'


def copy_button(error_id: str | None, column: str = "") -> str:
    """A button "Copy details" with the text it copies as HTML; "" in public mode and where the report is not in this process.

    column: the notation of the column that failed, added to the text.
    """
    report = error_log.find(error_id)
    if report is None or get_settings().public:
        return ""
    text = f"Column: {column}\n\n{report.details}" if column else report.details
    return (
        '<button type="button" class="quiet" data-copy-details>Copy details</button>'
        f'<pre class="details" hidden>{esc(text)}</pre>'
    )
