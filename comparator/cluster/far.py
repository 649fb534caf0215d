"""Looking from one actor at what another one holds: its scores, row by row, and its weights, layer by layer.

Nothing is sent ahead: what a statistic needs is asked for when it needs it, a block at a time, and comes through Ray's
object store (shared memory on one machine). Runs in the actor that compares.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from comparator.scoring import Kept
from comparator.types import Problem

AHEAD = 16  # rows of an answer that are fetched together: they are asked for one by one


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
class FarKept(Kept):
    """Scores on the disk of a node. `owner` names the actor that wrote them, `node` is Ray's id of its machine.
    `holder` is the actor itself, for whoever reads them; outside Ray there is none."""

    owner: str = ""
    node: str = ""
    place: str = ""
    holder: Any = None

    def rows(self, start: int, end: int) -> Any:
        """As `Kept.rows`. Raises `Problem` where the actor that has them is gone."""
        import ray

        if ray.is_initialized() and ray.get_runtime_context().get_node_id() == self.node:
            return super().rows(start, end)
        low, found = _recent.get((self.path, self.holder), (0, None))
        if found is None or start < low or end > low + len(found):
            low, last = start, min(self.count, max(end, start + AHEAD))
            plain = Kept(self.path, self.count, self.vocabulary, self.dtype)
            found = _got(self.holder.rows.remote(plain, start, last), self.place).tensor()
            _recent.clear()  # one block at a time
            _recent[self.path, self.holder] = (low, found)
        return found[start - low : end - low]


_recent: dict = {}


def _got(reference: Any, place: str) -> Any:
    """What another actor gives. Raises `Problem` where it is gone."""
    import ray

    from comparator.cluster.failures import lost

    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, Problem):
            raise cause from None
        raise lost(error, "giving the reference's figures", place) from None


@dataclass(frozen=True)
class FarWeightErrors:
    """`scoring_tasks.WeightErrors` where the reference is in another actor. Gives {layer row's name: error}."""

    handle: str
    reference: str
    holder: Any
    place: str

    def run(self, door: Any, cancel: threading.Event, told: Callable) -> dict[str, dict[str, float | None]]:
        from comparator import weight_errors

        slot = door.slot(self.handle)
        known = slot.loaded.extra.setdefault("weight errors", {})
        if self.reference not in known:
            far = FarModel(self)
            known[self.reference] = weight_errors.all_errors(
                slot.model, slot.backend, far, far, cancel, lambda share: told(share, "comparing the weights")
            )
        return known[self.reference]


class FarModel:
    """As much of a model, and of the backend that packed it, as comparing weights needs."""

    def __init__(self, task: FarWeightErrors):
        self.task = task

    def named_modules(self) -> Iterator[tuple[str, FarModule]]:
        task = self.task
        for name in _got(task.holder.module_names.remote(task.reference), task.place):
            yield name, FarModule(self, name)

    def dequantize(self, module: FarModule) -> Any:
        return module.tensors.get("dequantized")


class FarModule:
    """One module: its own tensors as attributes, fetched at the first look and not kept beyond the next module's."""

    def __init__(self, model: FarModel, name: str):
        self._model, self._name = model, name

    @property
    def tensors(self) -> dict[str, Any]:
        task = self._model.task
        key = (task.reference, self._name)
        if key not in _fetched:
            packed = _got(task.holder.module_tensors.remote(*key), task.place)
            _fetched.clear()
            _fetched[key] = {name: tensor.tensor() for name, tensor in packed.items()}
        return _fetched[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            return self.tensors[name]
        except KeyError:
            raise AttributeError(name) from None


_fetched: dict = {}


@dataclass(frozen=True)
class ModuleNames:
    """A task: the modules of a resident variant that hold tensors of their own."""

    handle: str

    def run(self, door: Any, cancel: threading.Event, told: Callable) -> tuple[str, ...]:
        from comparator.weight_errors import own, plain

        model = door.slot(self.handle).model
        return tuple(plain(n) for n, module in model.named_modules() if any(True for _ in own(module)))


@dataclass(frozen=True)
class ModuleTensors:
    """A task: the tensors of one module, and its weight unpacked where it is quantized; on the host."""

    handle: str
    name: str

    def run(self, door: Any, cancel: threading.Event, told: Callable) -> dict[str, Packed]:
        from comparator.weight_errors import own, plain

        slot = door.slot(self.handle)
        module = next(m for n, m in slot.model.named_modules() if plain(n) == self.name and any(own(m)))
        found = {name: Packed.of(tensor) for name, tensor in own(module)}
        unpacked = slot.backend.dequantize(module)
        return found if unpacked is None else {**found, "dequantized": Packed.of(unpacked)}


@dataclass(frozen=True)
class Beside:
    """A task that needs two models in one place: the second is loaded beside the first for as long as it takes."""

    task: Any
    model: str
    variant: Any
    max_memory: dict[int | str, int] | None = None
