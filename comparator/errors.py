"""What libraries raise → a `Problem`: what is wrong, and a way out. Knows the messages, nothing else."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

from comparator.types import Problem, Stopped


def explain(error: BaseException, doing: str = "") -> Problem:
    """`doing`: what was under way, as in “load nf4”."""
    if isinstance(error, Problem):
        return error
    said = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
    low = said.lower()
    if (
        type(error).__name__ in ("OutOfMemoryError", "AcceleratorError")
        or isinstance(error, MemoryError)
        or ("out of memory" in low or "can't allocate memory" in low or "not enough memory" in low)
    ):
        return Problem(
            f"Out of memory while trying to {doing or 'run'}: {said}",
            "Unload other variants, shorten the prompt or the answer, or choose a smaller variant.",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Problem("The disk is full.", "Free some space, or set COMPARATOR_CACHE_DIR to another disk.")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS):
        return Problem(f"A file cannot be written or read: {said}", "Check the folder's permissions.")
    if isinstance(error, ImportError):
        return Problem(f"A library is missing or broken: {said}", "Install requirements.txt again.")
    if (
        "safetensor" in type(error).__name__.lower()
        or "safetensors" in low
        or "headertoo" in low.replace(" ", "")
    ):
        return Problem(
            f"The weights cannot be read: {said}", "The file is damaged: download or write it again."
        )
    if "size mismatch" in low or "shapes cannot be multiplied" in low:
        return Problem(
            f"The weights do not fit the model's shape: {said}",
            "The checkpoint and its config.json disagree.",
        )
    return Problem(
        f"Could not {doing or 'go on'}: {type(error).__name__}: {said}",
        "The other columns are not affected. If this looks wrong, report it with the model and the variant.",
    )


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn what libraries raise into a `Problem` with a way out. `Problem` and `Stopped` pass as they are."""
    try:
        yield
    except (Problem, Stopped):
        raise
    except Exception as error:
        problem = explain(error, doing)
        # The traceback holds the frames that hold the tensors: without this an out-of-memory error keeps the
        # memory it ran out of.
        error.__traceback__ = None
        from comparator.metrics.memory import give_back

        give_back()
        raise problem from None
