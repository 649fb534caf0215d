"""Reads another actor's logits, in blocks of rows, and its weights, layer by layer.

Data is fetched when a statistic needs it, through Ray's object store (shared memory on one machine). Runs in the actor
that compares.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from comparator.core.errors import UserError
from comparator.core.variant import Variant
from comparator.engine.protocol import OnProgress, Task, TaskContext
from comparator.fidelity.logits_store import StoredLogits
from comparator.runtimes import Weights

UNPACKED = "dequantized"  # a key among a module's tensors
AHEAD = 16  # rows fetched together, since they are read one by one


@dataclass(frozen=True)
class Packed:
    """A tensor as bytes that Ray carries without copying; numpy has no bf16."""

    data: Any  # numpy uint8
    dtype: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Any) -> Packed:
        import torch

        host = tensor.detach().to("cpu").contiguous()
        flat = host.reshape(-1).view(torch.uint8) if host.numel() else torch.empty(0, dtype=torch.uint8)
        return cls(flat.numpy(), str(host.dtype).removeprefix("torch."), tuple(host.shape))

    def tensor(self) -> Any:
        import torch

        if not self.data.size:
            return torch.empty(self.shape, dtype=getattr(torch, self.dtype))
        data = (
            self.data if self.data.flags.writeable else self.data.copy()
        )  # torch wants to own what it reads
        return torch.from_numpy(data).view(getattr(torch, self.dtype)).reshape(self.shape)


@dataclass(frozen=True)
class RemoteLogits(StoredLogits):
    """Logits on the disk of a node.

    Attributes:
        owner: the id of the `ActorHandle` that wrote them.
        node: Ray's id of its machine; `place` is its name for messages.
        actor: Ray's handle of that actor, for whoever reads them; outside Ray there is none.
    """

    owner: str = ""
    node: str = ""
    place: str = ""
    actor: Any = None

    def rows(self, start: int, end: int) -> Any:
        """As `StoredLogits.rows`. Raises `UserError` if the actor that has them is lost."""
        import ray

        if ray.is_initialized() and ray.get_runtime_context().get_node_id() == self.node:
            return super().rows(start, end)
        key = (self.path, self.actor)
        low, block = _recent.get(key, (0, None))
        if block is None or start < low or end > low + len(block):
            low, last = start, min(self.count, max(end, start + AHEAD))
            plain = StoredLogits(self.path, self.count, self.vocabulary, self.dtype)
            block = _get(self.actor.rows.remote(plain, start, last), self.place).tensor()
            _recent.clear()  # one block at a time
            _recent[key] = (low, block)
        return block[start - low : end - low]


_recent: dict = {}


def _get(reference: Any, place: str) -> Any:
    """Another actor's answer. Raises `UserError` if the actor is lost."""
    import ray

    from comparator.cluster.errors import lost

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, UserError):
            raise cause from None
        raise lost(error, "returning the reference's figures", place) from None


@dataclass(frozen=True)
class RemoteWeightErrors(Task):
    """`fidelity.tasks.WeightErrors` where the reference is in another actor. Returns {layer row's name: error}."""

    handle: str
    reference: str
    actor: Any
    place: str

    def run(
        self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress
    ) -> dict[str, dict[str, float | None]]:
        from comparator.fidelity import weight_error

        slot = context.slot(self.handle)
        ours = slot.weights()
        if ours is None:
            return {}
        if self.reference not in slot.weight_errors:
            slot.weight_errors[self.reference] = weight_error.all_errors(
                ours, RemoteWeights(self), cancel, lambda share: on_progress(share, "comparing the weights")
            )
        return slot.weight_errors[self.reference]


class RemoteWeights(Weights):
    """The weights of a model in another actor. A module's tensors are fetched at the first use and dropped at the next
    module's."""

    def __init__(self, task: RemoteWeightErrors):
        self.task = task
        self._names = set(self.modules())
        self._fetched: tuple[str, dict[str, Any]] = ("", {})

    def modules(self) -> Sequence[str]:
        return _get(self.task.actor.module_names.remote(self.task.reference), self.task.place)

    def tensors(self, module: str) -> dict[str, Any]:
        if module not in self._names:
            return {}
        if self._fetched[0] != module:
            self._fetched = ("", {})
            packed = _get(self.task.actor.module_tensors.remote(self.task.reference, module), self.task.place)
            self._fetched = (module, {name: tensor.tensor() for name, tensor in packed.items()})
        return self._fetched[1]

    def unpacked(self, module: str) -> Any | None:
        return self.tensors(module).get(UNPACKED)


@dataclass(frozen=True)
class ModuleNames(Task):
    """A task: the modules of a resident variant that hold tensors of their own."""

    handle: str

    def run(self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress) -> tuple[str, ...]:
        weights = context.slot(self.handle).weights()
        return tuple(weights.modules()) if weights else ()


@dataclass(frozen=True)
class ModuleTensors(Task):
    """A task: the tensors of one module, and its weight unpacked where it is quantized; on the host."""

    handle: str
    name: str

    def run(
        self, context: TaskContext, cancel: threading.Event, on_progress: OnProgress
    ) -> dict[str, Packed]:
        weights = context.slot(self.handle).weights()
        tensors = {name: Packed.of(tensor) for name, tensor in weights.tensors(self.name).items()}
        unpacked = weights.unpacked(self.name)
        return tensors if unpacked is None else {**tensors, UNPACKED: Packed.of(unpacked)}


@dataclass(frozen=True)
class WithSecondModel:
    """A task that needs two models in one place: the second is loaded next to the first for as long as it takes."""

    task: Any
    model: str
    variant: Variant
    max_memory: dict[int | str, int] | None = None
