"""Every `Runtime` class in this folder, by name. Imports nothing heavy."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from comparator.backends import backend_for
from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.runtimes.base import Choices, ResidentModel, Runtime, Weights

__all__ = ["Choices", "ResidentModel", "Runtime", "Weights", "all_runtimes", "runtime_for"]


@cache
def all_runtimes() -> dict[str, Runtime]:
    """One instance of each class, by name."""
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    classes = {v for m in modules for v in vars(m).values() if isinstance(v, type) and issubclass(v, Runtime)}
    return {c.name: c() for c in classes if "name" in vars(c)}


def runtime_for(variant: Variant) -> Runtime:
    """What executes the variant. Raises `UserError` where the backend names a runtime that is not there."""
    name = backend_for(variant).runtime
    if name not in all_runtimes():
        raise UserError(
            f"{variant.method} needs the runtime {name}.", f"There are {', '.join(all_runtimes())}."
        )
    return all_runtimes()[name]
