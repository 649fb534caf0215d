"""Quantized variants of one language model, side by side: what each loses, what it gains, and where.

    import comparator

    for event in comparator.compare(prompt="What is the capital of France?", variants=["bf16", "nf4:dq"]):
        ...
    comparison = comparator.run(prompt="What is the capital of France?", variants=["bf16", "nf4:dq"])

Importing this is quick: torch and transformers load when a comparison starts.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from comparator.core import VERSION
from comparator.core.errors import UserError
from comparator.core.request import GenerationSettings, Request
from comparator.core.result import CellResult, Comparison
from comparator.core.variant import Adapter, Cell, Variant

if TYPE_CHECKING:
    from comparator.api import compare, run
    from comparator.backends import resolve

__version__ = VERSION
__all__ = ["Adapter", "Cell", "CellResult", "Comparison", "GenerationSettings", "Request", "UserError", "Variant",
           "compare", "resolve", "run"]  # fmt: skip

_FUNCTIONS = {"compare": "comparator.api", "run": "comparator.api", "resolve": "comparator.backends"}
_MODULES = ("code", "document", "report", "types")  # usable as `comparator.report` without importing each


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"comparator.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
