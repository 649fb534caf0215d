"""Routes a task to the actor that runs it.

A task runs in the actor of its variant. It fetches data of other actors piece by piece (remote_tensors.py), so no logits
pass through the app. For a task that swaps layers between two models, the second one is loaded next to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from comparator.backends import resolve
from comparator.cluster.errors import AGAIN
from comparator.cluster.remote_tensors import RemoteLogits, RemoteWeightErrors, WithSecondModel
from comparator.core.errors import UserError
from comparator.engine.protocol import Task
from comparator.fidelity.adapter_drift import MeasureDrift
from comparator.fidelity.logits_store import StoredLogits
from comparator.fidelity.sensitivity import OnePartAtATime
from comparator.fidelity.tasks import WeightErrors

if TYPE_CHECKING:
    from comparator.cluster.actor_handle import ActorHandle


def routed(
    task: Task, actor_of: Callable[[str], ActorHandle], actors: Iterable[ActorHandle]
) -> tuple[ActorHandle | None, Any]:
    """(the actor, or None for whichever reads models; the task for it). `actor_of` finds the actor of a handle, or raises
    `UserError`."""
    owners = {actor.id: actor for actor in actors}
    if isinstance(task, MeasureDrift):
        return _owner(task.variant_with, owners), _with_actors(task, owners)
    if task.runs_on is None:
        return None, task
    actor = actor_of(task.runs_on)
    if isinstance(task, (WeightErrors, OnePartAtATime)):
        other = actor_of(task.reference)
        if actor is other:
            return actor, task
        if isinstance(task, WeightErrors):
            return actor, RemoteWeightErrors(task.handle, task.reference, other.actor, other.place)
        model, notation, *_ = other.key
        return actor, WithSecondModel(task, model, resolve(notation), actor.limits)
    return actor, _with_actors(task, owners)


def stored_at(result: Any, actor: ActorHandle) -> Any:
    """A task's result; logits stored on a node become `RemoteLogits` with their location."""
    if type(result) is not StoredLogits:
        return result
    return RemoteLogits(
        result.path, result.count, result.vocabulary, result.dtype, actor.id, actor.facts.node, actor.place
    )


def _with_actors(task: Any, owners: dict[str, ActorHandle]) -> Any:
    """The task with the actors that have the logits it reads."""
    changed = {
        f.name: replace(logits, actor=_owner(logits, owners).actor)
        for f in fields(task)
        if isinstance(logits := getattr(task, f.name), RemoteLogits)
    }
    return replace(task, **changed) if changed else task


def _owner(logits: RemoteLogits, owners: dict[str, ActorHandle]) -> ActorHandle:
    if logits.owner not in owners:
        raise UserError(f"The reference's scores were lost with the actor on {logits.place}.", AGAIN)
    return owners[logits.owner]
