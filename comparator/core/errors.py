"""The two exceptions that every layer raises: `UserError` (a problem with a way out) and `Stopped`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ErrorReport:
    """An unexpected exception as text, for a bug report. Pickles; holds no frames and so no tensors.

    `id`: short enough to read out; `doing`: the operation ("load nf4"); `environment`: versions of Python and libraries;
    `machine`, `log_file`: where it was logged first (None if no file could be written).
    """

    id: str
    doing: str
    time: str
    traceback: str
    environment: str = ""
    request: str = ""
    machine: str = ""
    log_file: str | None = None

    @property
    def details(self) -> str:
        """The text of "Copy details", without the log file's path."""
        parts = (
            f"Error {self.id} while trying to {self.doing}, {self.time}",
            self.environment,
            self.request,
            self.traceback,
        )
        return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


class UserError(Exception):
    """A problem that the user can act on, with advice. The page, the command line and the document show both as they are.

    `report` holds the traceback if the cause is a library's exception and not a wrong input.
    """

    def __init__(self, problem: str, advice: str = "", report: ErrorReport | None = None):
        super().__init__(problem, advice)
        self.problem = problem
        self.advice = advice
        self.report = report

    def __str__(self) -> str:
        return f"{self.problem} {self.advice}".strip()


class Stopped(Exception):
    """Raised at the next safe point after a stop was requested."""
