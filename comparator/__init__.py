"""Quantized variants of one language model, side by side: what each loses, what it gains, and where.

    import comparator

    for event in comparator.compare(prompt="What is the capital of France?", variants=["bf16", "nf4:dq"]):
        ...
    comparison = comparator.run(prompt="What is the capital of France?", variants=["bf16", "nf4:dq"])

Importing this is quick: torch and transformers load when a comparison starts.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from comparator.types import (
    Adapter,
    Cell,
    CellResult,
    Comparison,
    GenerationSettings,
    Problem,
    Request,
    Variant,
)

if TYPE_CHECKING:
    from comparator.api import compare, run
    from comparator.backends import resolve

__version__ = "0.1.0"
__all__ = ["Adapter", "Cell", "CellResult", "Comparison", "GenerationSettings", "Problem", "Request", "Variant",
           "compare", "resolve", "run"]  # fmt: skip

_LAZY = {"run": "comparator.api", "resolve": "comparator.backends"}


class _CallableModule(ModuleType):
    """The module `comparator.compare`, which is also the function of that name."""

    def __call__(self, *arguments: Any, **named: Any):
        from comparator import api

        return api.compare(*arguments, **named)


class _Package(ModuleType):
    """`comparator.compare` is a module and a function; whichever is asked for first, both work.

    The import system sets a submodule as an attribute of its package, and so passes here.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "compare" and type(value) is ModuleType:
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "compare":
        return importlib.import_module("comparator.compare")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
