"""ZeroGPU: a Space whose GPU is lent for one call at a time. The only module that imports the PyPI package `spaces`.

Import this before anything that imports torch: the package has to be there before CUDA is touched. Everywhere else
it does nothing, costs nothing and needs nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, TypeVar

from comparator.core.request import AUTOMATIC_ROUNDS, GenerationSettings, Request

F = TypeVar("F", bound=Callable[..., Any])

MAX_DURATION_S = 120  # what a visitor without an account can be lent at once
# Rough and generous: a call that outlives its duration is ended, one that asks for less waits shorter.
_START_S = 15.0  # the lent process begins, torch wakes up
_LOAD_S_PER_B = 6.0  # a column, per 10^9 parameters: reading, quantizing
_TOKEN_S, _TOKEN_S_PER_B = 0.02, 0.012  # a token of one column, eagerly decoded


def _package():
    """The PyPI package, or None. The folder `spaces/` of this repo answers to the same import; it has no GPU."""
    if os.environ.get("SPACES_ZERO_GPU", "").lower() not in ("1", "t", "true"):
        return None
    try:
        import spaces
    except ImportError:
        return None
    return spaces if hasattr(spaces, "GPU") else None


_spaces = _package()


def active() -> bool:
    """Whether this is a ZeroGPU Space and the package is there."""
    return _spaces is not None


def gpu(function: F, duration: int | Callable[..., int] | None = None) -> F:
    """`function` with a GPU lent to it for the length of each call; elsewhere `function` itself.

    `duration` is in seconds, or a function of the same arguments that says how many. The function must be sync
    (a generator is fine); arguments and results are pickled, since the call runs in another process. Wrap it when
    the module is imported: the Space learns at its start which functions there are.
    """
    if _spaces is None:
        return function
    return _spaces.GPU(function, duration=duration)


def duration_s(request: Request, parameters: int | None = None) -> int:
    """Seconds to ask for so that one call can run all of the request's columns, at most MAX_DURATION_S.

    `parameters` of the model; None where they are not known yet, then as for 10^9.
    """
    billions = (parameters if parameters is not None else 10**9) / 1e9
    settings: GenerationSettings = request.settings
    tokens = settings.max_new_tokens * (settings.repeats or AUTOMATIC_ROUNDS)
    if settings.decode == "both":
        tokens *= 2
    if request.fidelity != "none":
        tokens += settings.max_new_tokens  # the reference's answer is scored token by token
    column_s = _LOAD_S_PER_B * billions + tokens * (_TOKEN_S + _TOKEN_S_PER_B * billions)
    return min(MAX_DURATION_S, math.ceil(_START_S + len(request.cells) * column_s))
