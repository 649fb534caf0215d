"""What libraries raise → a `UserError`: what is wrong, a way out, and the id of the entry in the error log."""

from __future__ import annotations

import contextlib
import errno

from comparator.core.errors import Stopped, UserError
from comparator.core.settings import get_settings
from comparator.util import cuda_errors, error_log, formatting

AFTER_DAMAGE = (
    "Nothing else can run on this GPU until the app has been started again, which `make run` does by itself."
)
REPORT = "The other variants are not affected. If this looks like a bug in this app, report it with the error's details."


def explain(error: BaseException, doing: str = "") -> UserError:
    """Log `error` with its traceback and say in one sentence what it is.

    doing: what was under way, as in "load nf4". A `UserError` is returned as it is; it is logged only where a library's
    exception is its cause (`raise UserError(...) from error`).
    """
    if isinstance(error, UserError):
        if error.report is None and error.__cause__ is not None:
            error.report = error_log.record(error, doing)
        return error
    report = error_log.record(error, doing)
    problem, advice = _cause(error, doing or "run")
    if get_settings().public:
        problem = error_log.without_paths(problem)
    return UserError(error_log.scrub(problem), advice, report)


def _cause(error: BaseException, doing: str) -> tuple[str, str]:
    """(problem, advice)."""
    line = formatting.first_line(error)
    low = line.lower()
    if cuda_errors.is_out_of_memory(error):
        return (
            f"Out of memory while trying to {doing}: {line}",
            "Unload other variants, shorten the prompt or the answer, or choose a smaller variant.",
        )
    if cuda_errors.note(error):
        return (
            f"The GPU failed while trying to {doing}, and its context is damaged: {line}",
            f"{AFTER_DAMAGE} If it happens again, report it with the error's details.",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "The disk is full.", "Free some space, or set COMPARATOR_CACHE_DIR to another disk."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return f"A file cannot be written or read: {line}", "Check the folder's permissions."
    if isinstance(error, ImportError):
        return f"A library is missing or broken: {line}", "Install requirements.txt again."
    if (
        "safetensor" in type(error).__name__.lower()
        or "safetensors" in low
        or "headertoo" in low.replace(" ", "")
    ):
        return f"The weights cannot be read: {line}", "The file is damaged: download or write it again."
    if "size mismatch" in low or "shapes cannot be multiplied" in low:
        return (
            f"The weights do not fit the model's shape: {line}",
            "The checkpoint and its config.json disagree.",
        )
    return f"Could not {doing}: {type(error).__name__}: {line}", REPORT


def _is_panic(error: BaseException | None) -> bool:
    """Rust's panics, of the tokenizers library for instance, are no Exception, so that nobody handles them."""
    return type(error).__name__ == "PanicException"


class explained(contextlib.AbstractContextManager):
    """Turn what libraries raise into a `UserError` with a way out, and free the memory that its frames hold. `UserError`
    and `Stopped` pass as they are.

    A class and not a generator: contextlib's own frame would hold the traceback, and with it the tensors of its frames,
    so that an out-of-memory error kept the memory it ran out of.
    """

    def __init__(self, doing: str):
        self.doing = doing

    def __exit__(self, kind, error, frames) -> None:
        del frames
        if isinstance(error, Stopped) or not (isinstance(error, Exception) or _is_panic(error)):
            return
        problem = explain(error, self.doing)
        if problem is error:
            error_log.release(error.__cause__)
            return
        error_log.release(error)
        from comparator.metrics.memory import give_back

        with contextlib.suppress(RuntimeError):  # a damaged GPU context refuses this too
            give_back()
        raise problem from None
