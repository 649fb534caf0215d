"""Weights that several resident variants of one model have in common: read once, held once.

Two things, both decided by looking at the tensors and never by a method's name. A variant that holds the checkpoint
exactly as it is stored lends its tensors to the next one that loads, which then reads nothing. And what a method
leaves unquantized (embeddings, a head, norms) becomes one storage for all variants that have it bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from comparator.metrics.memory import held_tensors, nbytes, storage_key

if TYPE_CHECKING:
    from comparator.runtimes.transformers.resident import TransformersModel
    from comparator.sources import Checkpoint


@dataclass(frozen=True)
class Lent:
    """A checkpoint's tensors as a resident variant holds them: in its dtypes, on its device. Read only."""

    model_class: type
    tensors: Mapping[str, Any] = field(hash=False)
    lender: str  # its notation

    @property
    def note(self) -> str:
        return (
            f"Made from the resident weights of {self.lender}, so the load time does not include reading the "
            "checkpoint."
        )


def lent(checkpoint: Checkpoint, slots: Iterable[TransformersModel], device: str) -> Lent | None:
    """The first resident variant on `device` that holds this very checkpoint unchanged, by its tensors' names, dtypes
    and shapes. A model whose names or dtypes were changed while it loaded (merged experts, another dtype) lends
    nothing: it would not give what the file gives."""
    for slot in slots:
        if not _may_share(slot) or slot.device != device or slot.key[0] != checkpoint.identity:
            continue
        held = _plain(slot.model)
        stored = [t for t in checkpoint.tensors if t.name in held or not checkpoint.is_tied_head(t.name)]
        if stored and all(_same(t, held.get(t.name)) for t in stored):
            tensors = {t.name: held[t.name].detach() for t in stored}
            return Lent(type(slot.model), tensors, slot.variant.notation)
    return None


def share(model: Any, slots: Iterable[TransformersModel], device: str) -> int:
    """Let `model` use the storages of resident variants for parameters that are equal bit for bit; returns the bytes
    that this frees. Only whole, ordinary parameters of the same name: what a library packed stays its own."""
    import torch

    others = [_plain(s.model) for s in slots if _may_share(s) and s.device == device]
    freed = 0
    for name, mine in _plain(model).items():
        for held in others:
            theirs = held.get(name)
            if theirs is None or theirs.dtype != mine.dtype or theirs.shape != mine.shape:
                continue
            if storage_key(theirs) == storage_key(mine):
                break
            if theirs.stride() == mine.stride() and torch.equal(theirs, mine):
                freed += nbytes(mine)
                mine.data = theirs.data
                break
    return freed


def storages(model: Any) -> dict[tuple, int]:
    """Every storage that the model holds, with its bytes."""
    found: dict[tuple, int] = {}
    for tensor in held_tensors(model):
        if tensor.numel():
            key = storage_key(tensor)
            found[key] = max(found.get(key, 0), nbytes(tensor))
    return found


def _may_share(slot: TransformersModel) -> bool:
    """Not a base that an adapter was merged into, and not one that accelerate moves about."""
    return slot.private is None and not slot.spread


def _plain(model: Any) -> dict[str, Any]:
    """The parameters that are ordinary tensors, by name; a tied one once."""
    import torch

    return {n: p for n, p in model.named_parameters() if type(p) is torch.nn.Parameter and p.numel()}


def _same(stored: Any, held: Any) -> bool:
    from comparator.backends.dtypes import short_name

    return (
        held is not None
        and held.device.type != "meta"
        and short_name(held.dtype) == stored.dtype
        and tuple(held.shape) == tuple(stored.shape)
    )
