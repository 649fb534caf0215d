"""Every `Backend` class in this folder, by method. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any

from comparator.backends.base import Backend, Method, QuantizedType
from comparator.core.errors import UserError
from comparator.core.state import ModelFacts
from comparator.core.variant import Variant, parse_variant
from comparator.sources import packed
from comparator.sources.checkpoint import Checkpoint

__all__ = [
    "all_backends", "backend_for", "libraries", "loaded_sizes", "methods", "most_precise", "offers", "own_variant", "owner", "packages", "presets",
    "quantized_type", "readers", "require_full_precision", "resolve", "source_kind",
    "unquantized_experts",
]  # fmt: skip


@cache
def all_backends() -> tuple[Backend, ...]:
    """One instance of each class, the one with the most precise method first."""
    instances: dict[type, Backend] = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Backend) and "methods" in vars(value):
                instances[value] = value()
    return tuple(sorted(instances.values(), key=lambda b: -max(m.precision for m in b.methods)))


def methods() -> dict[str, tuple[Backend, Method]]:
    """Every method by name, most precise first."""
    pairs = [(b, m) for b in all_backends() for m in b.methods]
    return {m.name: (b, m) for b, m in sorted(pairs, key=lambda p: -p[1].precision)}


def backend_for(variant: Variant) -> Backend:
    """The backend that offers the variant's method. Raises `UserError` listing the methods there are."""
    known = methods()
    if variant.method not in known:
        near = difflib.get_close_matches(variant.method, known, n=1)
        meant = f"Did you mean {near[0]}? " if near else ""
        raise UserError(
            f"There is no method “{variant.method}”.", f"{meant}The methods are {', '.join(known)}."
        )
    return known[variant.method][0]


def resolve(variant: str | Variant) -> Variant:
    """Notation → validated, canonical `Variant`. Raises `UserError`; the one way to make a variant from text."""
    parsed = parse_variant(variant) if isinstance(variant, str) else variant
    return backend_for(parsed).canonical(parsed)


def presets() -> list[str]:
    """Ready-made notations for the page, most precise first."""
    return [p for _, m in methods().values() for p in m.ready_notations]


def loaded_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes that each preset would hold on its device, by notation, from the checkpoint's headers. Without those that cannot be
    made of it."""
    sizes = {}
    for variant in map(resolve, presets()):
        backend = backend_for(variant)
        with contextlib.suppress(Exception):  # loading says what is wrong with it
            require_full_precision(checkpoint)
            sizes[variant.notation] = backend.needed_bytes(backend.complete(variant, checkpoint), checkpoint)
    return sizes


def offers(model: str) -> list[str]:
    """Ready-made notations for this model, beside the presets."""
    return [notation for backend in all_backends() for notation in backend.offers(model)]


def source_kind(variant: Variant) -> str:
    """What the variant's source is, where it has one: "checkpoint" or "endpoint"."""
    return backend_for(variant).source_kind


def most_precise(variants: list[Variant]) -> Variant:
    """The variant that comes nearest to the checkpoint: the reference unless another is chosen."""
    known = methods()
    return max(variants, key=lambda v: known[v.method][1].precision)


# ------------------------------------------------------------ questions that every backend answers a part of


def owner(module: Any) -> Backend | None:
    """The backend that quantized a torch module, or None."""
    return next((backend for backend in all_backends() if backend.owns(module)), None)


def libraries() -> tuple[str, ...]:
    """Packages of all quantization libraries, for `str.startswith` on a class's `__module__`."""
    return tuple(name for backend in all_backends() for name in backend.libraries)


def packages() -> tuple[str, ...]:
    """What the backends need installed, each package once."""
    return tuple(dict.fromkeys(name for b in all_backends() for name in (*b.requires, *b.making)))


def require_full_precision(checkpoint: Checkpoint) -> None:
    """Raises `UserError` for a checkpoint that is quantized already: no variants can be made from it."""
    if checkpoint.quantization is None:
        return
    how = packed.method_of(checkpoint.quantization)
    named = readers(checkpoint.quantization)
    raise UserError(
        f"{checkpoint.source} is quantized already ({how}): other variants cannot be made from it.",
        f"Choose the full-precision model, and add this one as the variant {named[0]}@{checkpoint.source}."
        if named
        else "Choose the full-precision model it was made from.",
    )


def own_variant(facts: ModelFacts) -> Variant | None:
    """The one variant of a model that is quantized itself: METHOD@MODEL. None for a full-precision model, and where no
    backend loads it."""
    if facts.quantization is None or not (named := readers(facts.quantization)):
        return None
    source, _, revision = facts.source.partition("@") if facts.revision else (facts.source, "", "")
    return resolve(Variant(named[0], source, revision or None))


def readers(quantization: dict[str, Any]) -> list[str]:
    """Methods that load a checkpoint, by what its config.json says of the quantization."""
    return [name for b in all_backends() for name in b.readers(quantization)]


def unquantized_experts(variant: Variant, checkpoint: Checkpoint) -> str:
    """Before loading, in words: the share of the weights that are experts, where the method leaves those in 16 bits;
    "" where it has no such weights, or quantizes them."""
    backend = backend_for(variant)
    size = sum(t.parameters for t in checkpoint.tensors if ".experts." in t.name)
    share = size / checkpoint.parameters if checkpoint.parameters else 0.0
    if (
        variant.source
        or backend.quantizes_experts
        or backend.method(variant.method).bits >= 16
        or share < 0.01
    ):
        return ""
    return (
        f"{share:.0%} of its weights are experts, which transformers keeps as one parameter per layer and "
        f"{variant.method} leaves in 16 bits."
    )


def quantized_type(logical_dtype: str) -> QuantizedType | None:
    """The quantized dtype of that name in a layer row; None for a plain one, or one that no backend here knows."""
    known = (t for backend in all_backends() for t in backend.types)
    return next((t for t in known if t.name == logical_dtype), None)
