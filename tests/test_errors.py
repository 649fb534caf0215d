"""What libraries raise, as people read it."""

from __future__ import annotations

import errno

import pytest

from comparator.errors import explain
from comparator.types import Problem


@pytest.mark.parametrize(
    "error, names",
    [
        (MemoryError(), "Out of memory"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
            "Out of memory",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written"),
        (ImportError("libfoo.so"), "missing or broken"),
        (RuntimeError("size mismatch for lm_head"), "do not fit"),
        (RuntimeError("something odd"), "something odd"),
    ],
)
def test_each_has_a_cause_and_a_way_out(error, names):
    problem = explain(error, "load nf4")
    assert names in problem.problem and problem.advice


def test_problems_pass():
    problem = Problem("a", "b")
    assert explain(problem) is problem
