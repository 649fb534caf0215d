"""A mixed-precision recipe: which parts of a quantized variant to keep in the reference's dtype, for a target size.

The rule is greedy: parts in the order of their measured divergence per byte that keeping them adds, each taken where it still
fits. Divergences of single parts do not add up to the whole model's, so the recipe is a variant to measure, not a result.
Kept means 16 bits (the `skip` option): no backend here holds two quantized types in one model.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

from comparator.backends import backend_for, resolve
from comparator.core.errors import UserError
from comparator.core.result import LayerRow
from comparator.core.variant import Variant
from comparator.engine.protocol import Engine, ignore
from comparator.fidelity.sensitivity import Part, resident_handle

RULE = "Parts are kept in the order of their measured divergence per byte added, each if it still fits the target."
_LAYER = re.compile(r"^(.*?\.\d+)\.")


@dataclass(frozen=True)
class Recipe:
    """`variant`: the proposal. `kept`: names of the parts that stay in 16 bits, in the order of their choice. `share`: of the
    parts' divergences, summed, that of the kept ones. `bytes`: of weights and quant state as they are after the first use;
    `quantized_bytes`, `reference_bytes`: of the variant as it was, and of the reference. `bits`: bits per weight."""

    variant: Variant
    kept: tuple[str, ...]
    share: float
    bytes: int
    quantized_bytes: int
    reference_bytes: int
    bits: float


def check(variant: Variant) -> None:
    """Raises `UserError` where layers of this variant cannot be kept."""
    if variant.source or "skip" not in {o.name for o in backend_for(variant).method(variant.method).options}:
        raise UserError(
            f"{variant.notation} cannot keep layers in 16 bits.",
            "A recipe needs nf4, fp4 or int8, which have the option skip=.",
        )


def propose(
    engine: Engine,
    model: str,
    variant: Variant,
    reference: Variant,
    parts: Sequence[Part],
    target_bytes: int | None = None,
    target_bits: float | None = None,
) -> Recipe:
    """The recipe for a size in bytes, or for bits per weight, from the parts that `sensitivity.measure` gave. Raises `UserError`
    for a target that the variant does not fit, or that the reference fits whole."""
    cancel = threading.Event()
    with engine.queue.turn(cancel, ignore, lambda: f"a recipe from {variant.notation} is being made"):
        handles = [resident_handle(engine, model, column, cancel) for column in (reference, variant)]
        base, donor = (engine.layers(handle) for handle in handles)
    return make(variant, parts, donor, base, target_bytes, target_bits)


def make(
    variant: Variant,
    parts: Sequence[Part],
    quantized: Sequence[LayerRow],
    reference: Sequence[LayerRow],
    target_bytes: int | None = None,
    target_bits: float | None = None,
) -> Recipe:
    """`propose` from the layer rows of both."""
    small, large = _bytes(quantized), _bytes(reference)
    count = sum(row.parameters for row in reference if row.tied_to is None)
    total, whole = sum(small.values()), sum(large.values())
    target = round(target_bits * count / 8) if target_bits is not None else target_bytes
    assert target is not None
    if target < total:
        raise UserError(
            f"{variant.notation} takes {total / 1e6:,.1f} MB ({8 * total / count:.2f} bits per weight) with nothing kept.",
            f"Choose a larger target or a smaller variant; the target is {target / 1e6:,.1f} MB.",
        )
    if target >= whole:
        raise UserError(
            f"The whole reference fits: it takes {whole / 1e6:,.1f} MB ({8 * whole / count:.2f} bits per weight).",
            "Use the reference, or choose a smaller target.",
        )
    extra = {p.name: sum(large.get(m, 0) - small.get(m, 0) for m in p.modules) for p in parts}
    kept, size = [], total
    for part in sorted(parts, key=lambda p: p.kl_mean / max(extra[p.name], 1), reverse=True):
        if size + extra[part.name] <= target:
            kept.append(part)
            size += extra[part.name]
    if not kept:
        least = min(extra.values())
        raise UserError(
            f"No part fits: {variant.notation} takes {total / 1e6:,.1f} MB, and the smallest part adds {least / 1e6:,.2f} MB.",
            "Choose a larger target, or measure smaller parts (--by module).",
        )
    every = sum(p.kl_mean for p in parts)
    return Recipe(
        _keeping(variant, kept), tuple(p.name for p in kept), sum(p.kl_mean for p in kept) / every if every else 0.0,
        size, total, whole, 8 * size / count,
    )  # fmt: skip


def _bytes(rows: Sequence[LayerRow]) -> dict[str, int]:
    """By module."""
    sizes: dict[str, int] = {}
    for row in rows:
        module = row.name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + row.bytes + row.quant_state_bytes
    return sizes


def _keeping(variant: Variant, parts: Sequence[Part]) -> Variant:
    """The variant that leaves these parts unquantized, beside what it left before."""
    names = {name for part in parts for name in _short(part)}
    before = dict(variant.options).get("skip") or ""
    skip = "+".join(sorted(names | set(filter(None, before.split("+")))))
    others = tuple(o for o in variant.options if o[0] != "skip")
    return resolve(replace(variant, options=(*others, ("skip", skip))))


def _short(part: Part) -> set[str]:
    """As few names as mean the part's modules alone: a decoder layer by its prefix, a kind by its suffix."""
    layers = {m[1] for name in part.modules if (m := _LAYER.match(name))}
    if part.name.startswith("layer ") and len(layers) == 1:
        return layers
    if all(name == part.name or name.endswith(f".{part.name}") for name in part.modules):
        return {part.name}
    return set(part.modules)
