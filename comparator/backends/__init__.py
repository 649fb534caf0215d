"""Collects its siblings: every `Backend` class in this folder, by method. Imports nothing heavy."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache

from comparator.backends.base import Backend, Method
from comparator.notation import parse_variant
from comparator.types import Problem, Variant

__all__ = ["all_backends", "backend_for", "methods", "most_precise", "presets", "resolve"]


@cache
def all_backends() -> tuple[Backend, ...]:
    found: list[Backend] = []
    for info in pkgutil.iter_modules(__path__):
        if info.name in ("base", "loading"):
            continue
        module = importlib.import_module(f"{__name__}.{info.name}")
        found += [
            value()
            for value in vars(module).values()
            if isinstance(value, type)
            and issubclass(value, Backend)
            and value.__module__ == module.__name__
            and "methods" in vars(value)
        ]
    return tuple(sorted(found, key=lambda b: -max(m.precision for m in b.methods)))


def methods() -> dict[str, tuple[Backend, Method]]:
    """Every method by name, most precise first."""
    pairs = [(b, m) for b in all_backends() for m in b.methods]
    return {m.name: (b, m) for b, m in sorted(pairs, key=lambda p: -p[1].precision)}


def backend_for(variant: Variant) -> Backend:
    """The backend that offers the variant's method. Raises `Problem` listing the methods there are."""
    known = methods()
    if variant.method not in known:
        near = difflib.get_close_matches(variant.method, known, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        raise Problem(
            f"There is no method “{variant.method}”.", f"{meant}The methods are {', '.join(known)}."
        )
    return known[variant.method][0]


def resolve(variant: str | Variant) -> Variant:
    """Notation → validated, canonical `Variant`. Raises `Problem`; the one way to make a variant from text."""
    parsed = parse_variant(variant) if isinstance(variant, str) else variant
    return backend_for(parsed).canonical(parsed)


def presets() -> list[str]:
    """Ready-made notations for the page, most precise first."""
    return [p for _, m in methods().values() for p in (m.presets or (m.name,))]


def most_precise(variants: list[Variant]) -> Variant:
    """The variant that comes nearest to the checkpoint: the reference unless another is chosen."""
    known = methods()
    return max(variants, key=lambda v: known[v.method][1].precision)
