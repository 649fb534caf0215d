"""Kinds of GPU errors: out of memory, and a damaged context, which only a restart of the process repairs.

CUDA reports both as `torch.AcceleratorError` (a `RuntimeError` before torch 2.8); only the messages differ.
"""

from __future__ import annotations

import threading

DAMAGED = threading.Event()  # set once a context of this process is damaged
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
# Errors of one call, after which the context stays usable (CUDA runtime API, cudaError_t).
_OF_ONE_CALL = ("no kernel image", "invalid argument", "invalid configuration", "invalid device", "invalid resource",
                "captur", "out of resources", "not permitted", "not supported", "not ready", "peer access",
                "driver version", "no cuda-capable")  # fmt: skip
_OF_THE_CONTEXT = ("illegal memory access", "device-side assert", "misaligned address", "unspecified launch failure",
                   "illegal instruction", "launch timed out", "uncorrectable", "invalid program counter",
                   "invalid address space", "hardware stack error", "context is destroyed")  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, of the device or of the process."""
    message = _first_line(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(words in message for words in _OUT_OF_MEMORY)
    )


def is_context_damaged(error: BaseException) -> bool:
    """Whether every later call to this GPU from this process will fail too."""
    message = _first_line(error)
    if is_out_of_memory(error) or any(words in message for words in _OF_ONE_CALL):
        return False
    return type(error).__name__ == "AcceleratorError" or any(words in message for words in _OF_THE_CONTEXT)


def note(error: BaseException) -> bool:
    """Sets `DAMAGED` where this error says that the context is; returns whether it does."""
    damaged = is_context_damaged(error)
    if damaged:
        DAMAGED.set()
    return damaged


def _first_line(error: BaseException) -> str:
    """The error itself, without torch's debugging hints, which mention device-side assertions after any error."""
    return str(error).strip().partition("\n")[0].lower()
