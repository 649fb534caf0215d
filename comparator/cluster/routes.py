"""A scoring task → the actor that runs it, and the task as that actor needs it.

The work goes to the column that is scored. What it needs of another actor it fetches from there, piece by piece
(far.py), so no logits pass through the app. One kind of task swaps layers between two models: for that the second one
is loaded beside the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from comparator.adapters.drift import MeasureDrift
from comparator.backends import resolve
from comparator.cluster.failures import AGAIN
from comparator.cluster.far import Beside, FarKept, FarWeightErrors
from comparator.scoring import Kept
from comparator.scoring_tasks import EncodeText, OtherTokenizer, WeightErrors
from comparator.sensitivity import OnePartAtATime
from comparator.types import Problem

if TYPE_CHECKING:
    from comparator.cluster.held import Held


def routed(task: Any, of: Callable[[str], Held], everybody: Iterable[Held]) -> tuple[Held | None, Any]:
    """(the actor, or None for whichever reads models; the task for it). `of` finds the actor of a handle, or raises
    `Problem`."""
    if isinstance(task, (EncodeText, OtherTokenizer)):
        return None, task
    owners = {held.id: held for held in everybody}
    if isinstance(task, MeasureDrift):
        return _owner(task.variant_with, owners), _with_holders(task, owners)
    if isinstance(task, (WeightErrors, OnePartAtATime)):
        held, other = of(task.handle), of(task.reference)
        if held is other:
            return held, task
        if isinstance(task, WeightErrors):
            return held, FarWeightErrors(task.handle, task.reference, other.actor, other.place)
        model, notation, *_ = other.key
        return held, Beside(task, model, resolve(notation), held.limits)
    return of(task.column.handle), _with_holders(task, owners)


def kept_at(item: Any, held: Held) -> Any:
    """Scores that were written on a node, with where they are."""
    if type(item) is not Kept:
        return item
    return FarKept(item.path, item.count, item.vocabulary, item.dtype, held.id, held.facts.node, held.place)


def _with_holders(task: Any, owners: dict[str, Held]) -> Any:
    """The task with the actors that have the scores it reads."""
    changed = {
        f.name: replace(kept, holder=_owner(kept, owners).actor)
        for f in fields(task)
        if isinstance(kept := getattr(task, f.name), FarKept)
    }
    return replace(task, **changed) if changed else task


def _owner(kept: FarKept, owners: dict[str, Held]) -> Held:
    if kept.owner not in owners:
        raise Problem(f"The reference's scores were lost with the actor on {kept.place}.", AGAIN)
    return owners[kept.owner]
